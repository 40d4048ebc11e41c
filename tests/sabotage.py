"""Digits whose reader takes its time, notes when it began, or kills its own process once."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from raypkg.data.sources.built_in import digits as load_digits
from raypkg.data.split import Split

BATCHES = 9  # read before the end
ROWS = 16  # of a split, that the digest of a run's data reads
FIRST = "EFFRAY_FIRST_BATCH"  # the variable that names the file for the note of the first batch


def _digits(split: str, before: Callable) -> Split:
    """Return the digits; ``before`` is called with the indices of each batch."""
    honest = load_digits("", split=split)
    return replace(honest, take=lambda indices: (before(indices), honest.take(indices))[1])


def _killed(split: str, marker: str | Path, now: Callable[[], object], batches: int = BATCHES) -> Split:
    """Return the digits that kill their reader once, after so many batches that were read while it was ``now``."""
    read = []

    def before(indices):
        if now():
            read.append(len(indices))
        if len(read) > batches and now() and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return _digits(split, before)


def load(root: str, *, split: str, run: str = "", phase: str = "") -> Split:
    """Kill, once, the process that reads, in a phase of a run."""

    def now():
        pretrained, selected = (Path(run, f"phases/{each}.json").exists() for each in ("pretrain", "select"))
        return phase == ("train" if selected else "select" if pretrained else "pretrain")

    return _killed(split, f"{run}/killed", now)


def load_and_kill_actor(root: str, *, split: str, marker: str = "") -> Split:
    """Kill, once, the process that reads, if it is an actor that holds a shard."""
    return _killed(split, marker, lambda: Path("/proc/self/cmdline").read_bytes().startswith(b"ray::Holder"))


def load_and_kill_once(root: str, *, split: str, marker: str = "") -> Split:
    """Kill, once, the process that reads the thirtieth batch."""
    return _killed(split, marker, lambda: True, 29)


def load_and_kill_trial(root: str, *, split: str, marker: str = "") -> Split:
    """Kill, once, the process of a trial of Ray Tune, some seconds after it opened the data, when its workers start."""
    if Path("/proc/self/cmdline").read_bytes().startswith(b"ray::ResourceTrainable") and not Path(marker).exists():
        Path(marker).touch()
        threading.Timer(4, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return load_digits(root, split=split)


def load_slowly(root: str, *, split: str) -> Split:
    """Give another process the time to come in between."""
    return _digits(split, lambda indices: time.sleep(0.01))


def load_and_note(root: str, *, split: str) -> Split:
    """Note when the first batch is read: what stands before it is the start of a run."""
    note = Path(os.environ[FIRST])

    def before(indices):
        if len(indices) > ROWS and not note.exists():
            note.write_text(str(time.time()))

    return _digits(split, before)

"""Requests whose disk fills or breaks, or whose process dies or is stopped, at any write; and damage to every file.

Whatever happens, the log has each request once, and model, history and all else are those of the undisturbed run.
"""

import errno
import io
import json
import os
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout, suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from raypkg.cli import main
from raypkg.methods.deltagrad.history import HistoryWriter
from raypkg.runs.storage import Storage

RUN = Path("runs/deltagrad/a")
TRAIN = "train --name {} --dataset table:rows.csv --train.epochs 2 --train.batch_size 20 --cluster.workers 0"
QUEUE = ({"delete": [1, 2], "id": "x"}, {"add": "table:rows.csv", "id": "y"}, {"restore": [2], "id": 3})
LINES = {
    "delete": "delete a --ids 1,2 --period 2",
    "add": "add a --data table:rows.csv",
    "stream": "stream a queue.jsonl",
    "together": "stream a queue.jsonl --together 2",
}
EVERY_LINE = pytest.mark.parametrize("line", LINES.values(), ids=LINES)
PASSING = {"time", "seconds", "digest", "previous"}  # facts of an entry that no two answers share
KILLED = 9
EVERY = os.environ.get("EFFRAY_EVERY_OPERATION")  # of a stream as well, and not one of four
FEWEST = 20  # operations of a request, lest nothing be attacked


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def effray(line):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(["deltagrad", *line.split()])
    return Ended(ended.value.code or 0, out.getvalue(), err.getvalue())


def refused(ended):
    """Return the one line by which a command refuses."""
    assert ended.code == 2
    assert ended.err.startswith("effray: ") and ended.err.count("\n") == 1 and ended.err.endswith("\n")
    return ended.err


def forked(line, *, errors="errors.txt"):
    """Return how a command ends in a process of its own."""
    child = os.fork()
    if not child:
        code = 1
        with suppress(BaseException):
            ended = effray(line)
            Path(errors).write_text(ended.err)
            code = ended.code
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


# The disk


class Disk:
    """Counts what is done to the disk; ``act`` may let it fail, with the number and kind of the operation."""

    def __init__(self):
        self.heal()

    def heal(self):
        self.count = 0
        self.act = lambda number, kind: None

    def __call__(self, kind):
        self.count += 1
        self.act(self.count, kind)

    def fail(self, start, kinds, code):
        """Let all operations of some kinds fail, from one on."""
        self.heal()

        def act(number, kind):
            if number >= start and kind in kinds:
                raise OSError(code, os.strerror(code))

        self.act = act

    def once(self, when, happens):
        """Let something happen before one operation."""
        self.heal()
        self.act = lambda number, kind: happens() if number == when else None


class Stream:
    """A file that is being written, in two halves."""

    def __init__(self, stream, disk):
        self._stream = stream
        self._disk = disk

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stream.close()

    def write(self, content):
        half = len(content) // 2
        self._stream.write(content[:half])
        self._disk("write")
        self._stream.write(content[half:])


class Watched(fs.LocalFileSystem):
    """The local files, all operations told to a disk."""

    def create_dir(self, path, **options):
        self.disk("write")
        super().create_dir(path, **options)

    def open_output_stream(self, path, **options):
        self.disk("write")
        return Stream(super().open_output_stream(path, **options), self.disk)

    def move(self, source, target):
        self.disk("write")
        super().move(source, target)
        self.disk("after")


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    watched = Watched()
    watched.disk = disk

    def storage(self, *arguments):
        original(self, *arguments)
        self._fs = watched

    original = Storage.__init__
    monkeypatch.setattr(Storage, "__init__", storage)
    for owner, name, kind in [
        (os, "mkdir", "write"),
        (os, "replace", "write"),
        (os, "fsync", "write"),
        (os, "unlink", "delete"),
        (os, "rmdir", "delete"),
        (HistoryWriter, "_write", "write"),
    ]:
        monkeypatch.setattr(owner, name, told(getattr(owner, name), disk, kind))
    return disk


def told(function, disk, kind):
    def operation(*arguments, **options):
        disk(kind)
        return function(*arguments, **options)

    return operation


def moments(line):
    """Return the operations at which a command is attacked, without end."""
    return count(1, 4 if line.startswith("stream") and not EVERY else 1)


# The run


class Place:
    """A folder with a recorded run that is attacked again and again."""

    def __init__(self, template):
        self._template = template
        self.renew()

    def renew(self):
        shutil.rmtree("runs", ignore_errors=True)
        shutil.copytree(self._template / "runs", "runs")

    @property
    def entries(self):
        return [json.loads(line) for line in (RUN / "log.jsonl").read_text().splitlines()]

    @property
    def state(self):
        """What every file of the run holds, of the log what is not of its time."""
        files = {str(path): path.read_bytes() if path.is_file() else None for path in RUN.rglob("*")}
        entries = [{name: value for name, value in entry.items() if name not in PASSING} for entry in self.entries]
        return {**files, str(RUN / "log.jsonl"): entries}

    def undisturbed(self, line):
        self.renew()
        assert effray(line).code == 0
        state = self.state
        self.renew()
        return state

    def finish(self, line):
        """Open the run, and ask again for what has not been answered."""
        assert effray("log a").code == 0
        if line.startswith("stream") or len(self.entries) == 1:
            assert effray(line).code == 0


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Return a folder with two short runs, their data and a queue."""
    folder = tmp_path_factory.mktemp("recorded")
    x = np.random.default_rng(0).normal(size=(60, 2))
    rows = "".join(f"{a:.3f},{b:.3f},{'pq'[i % 2]}\n" for i, (a, b) in enumerate(x))
    (folder / "rows.csv").write_text(f"a,b,label\n{rows}")
    (folder / "queue.jsonl").write_text("\n".join(map(json.dumps, QUEUE)))
    here = os.getcwd()
    os.chdir(folder)
    for name, options in {"a": "", "other": " --seed 1"}.items():
        assert effray(TRAIN.format(name) + options).code == 0
        shutil.rmtree(folder / f"runs/deltagrad/{name}/plots")
    os.chdir(here)
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rows.csv", "queue.jsonl"):
        shutil.copy(template / name, name)
    return Place(template)


# Deaths


@EVERY_LINE
def test_killed_at_any_write_a_request_is_answered_once(place, disk, line):
    expected = place.undisturbed(line)
    for number in moments(line):
        place.renew()
        disk.once(number, lambda: os._exit(KILLED))
        code = forked(line)
        disk.heal()
        if code == 0:
            break
        assert code == KILLED
        place.finish(line)
        assert place.state == expected, number
    assert number > FEWEST


@EVERY_LINE
def test_interrupted_at_any_write_a_request_leaves_nothing_of_itself(place, disk, line):
    def interrupt():
        raise KeyboardInterrupt

    expected = place.undisturbed(line)
    before = place.state
    for number in moments(line):
        place.renew()
        disk.once(number, interrupt)
        ended = effray(line)
        if disk.count < number:
            break
        message = refused(ended)
        answered = len(place.entries) > 1
        if line.startswith("stream"):
            assert message == "effray: interrupted; the same command answers the rest\n"
        elif answered:
            assert message == "effray: interrupted, but the request is answered\n"
        else:
            assert message == "effray: interrupted; the run is as it was, and the same command begins anew\n"
        assert answered or place.state == before, number
        place.finish(line)
        assert place.state == expected, number
    assert number > FEWEST


@EVERY_LINE
def test_terminated_a_request_ends_as_if_interrupted(place, disk, line):
    expected = place.undisturbed(line)
    for number in range(1, FEWEST, 4):
        place.renew()
        disk.once(number, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert forked(line) == 2
        assert Path("errors.txt").read_text().startswith("effray: interrupted")
        disk.heal()
        place.finish(line)
        assert place.state == expected, number


# Disks


@EVERY_LINE
def test_a_disk_that_is_full_from_any_write_on(place, disk, line):
    expected = place.undisturbed(line)
    before = place.state
    for number in moments(line):
        place.renew()
        disk.fail(number, {"write"}, errno.ENOSPC)
        ended = effray(line)
        if ended.code == 0:
            break
        message = refused(ended)
        assert "cannot write" in message and ("No space left" in message or "the disk is full" in message)
        entries = len(place.entries)
        assert entries > 1 or place.state == before, number
        assert ("the request holds all the same" in message) == (is_unsettled()), message
        disk.heal()
        place.finish(line)
        assert place.state == expected, number
    assert number > FEWEST


def is_unsettled():
    """Say whether the last answer's model is not in place, or nothing tells of it."""
    newest = sorted(Path(RUN, "versions").iterdir())[-1] / "model.safetensors"
    model = (RUN / "model.safetensors").read_bytes()
    noted = json.loads((RUN / "summary.json").read_text())["files"]["model.safetensors"]
    here = Storage(str(RUN)).digest("model.safetensors")
    return noted != here or (newest.exists() and newest.read_bytes() != model)


@EVERY_LINE
def test_a_disk_that_breaks_at_any_write_or_deletion(place, disk, line):
    expected = place.undisturbed(line)
    for number in moments(line):
        place.renew()
        disk.fail(number, {"write", "delete"}, errno.EROFS)
        ended = effray(line)
        if ended.code == 0:
            break
        refused(ended)
        disk.heal()
        place.finish(line)
        assert place.state == expected, number
    assert number > FEWEST


@pytest.mark.parametrize("line", ["log a", "verify a"])
def test_a_read_only_run_can_be_looked_at(place, disk, line):
    assert effray(LINES["delete"]).code == 0
    before = place.state
    disk.fail(1, {"write", "delete"}, errno.EROFS)
    assert effray(line).code == 0
    assert place.state == before


def test_leftovers_on_a_read_only_disk_are_named(place, disk):
    (RUN / "versions/00007").mkdir()
    disk.fail(1, {"write", "delete"}, errno.EROFS)
    message = refused(effray("log a"))
    assert "versions/00007', which no longer belongs to the run: Read-only file system" in message


# Damage


class Damage(NamedTuple):
    """What happens to a file."""

    kind: str
    position: int
    bits: int

    def befall(self, path, other):
        content = bytearray(path.read_bytes())
        position = self.position % max(1, len(content))
        path.unlink()
        if self.kind == "folder":
            path.mkdir()
        elif self.kind == "foreign":
            shutil.copy(other, path)
        elif self.kind == "empty":
            path.touch()
        elif self.kind == "cut":
            path.write_bytes(content[:position])
        elif self.kind == "gap":
            path.write_bytes(content[:position] + content[position + self.bits :])
        elif self.kind == "flip":
            content[position] ^= self.bits
            path.write_bytes(content)


KINDS = ("flip", "flip", "flip", "gap", "cut", "missing", "empty", "folder", "foreign")
DAMAGES = st.builds(Damage, st.sampled_from(KINDS), st.integers(0, 100_000), st.integers(1, 255))
FILES = (
    "config.toml", "log.jsonl", "rows.parquet", "model.safetensors", "requests/00001.parquet", "requests/00002.parquet",
    "added/00002.arrow", "versions/00002/history.arrow", "versions/00002/history.digests",
    "versions/00002/model.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def answered(template, tmp_path_factory):
    """Return a folder with two runs that have answered the same two requests."""
    root = tmp_path_factory.mktemp("answered") / "runs"
    shutil.copytree(template / "runs", root)
    for run in ("a", "other"):
        assert effray(f"delete {run} --ids 1,2 --root {root}").code == 0
        assert effray(f"add {run} --data table:{template}/rows.csv --root {root}").code == 0
    return root


@settings(derandomize=True, deadline=None, max_examples=150)
@given(name=st.sampled_from(FILES), damage=DAMAGES)
def test_a_damaged_file_is_named_or_the_result_is_right(answered, name, damage):
    damaged = answered.parent / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(answered, damaged)
    sound = effray(f"log a --root {damaged}")
    damage.befall(damaged / "deltagrad/a" / name, damaged / "deltagrad/other" / name)
    ended = effray(f"log a --root {damaged}")
    assert ended == sound or Path(name).name in refused(ended)

"""All runs below a root: finding them by name, listing them with their states, and deleting them."""

import fcntl
import os
import shlex
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from glob import escape
from typing import Any, NamedTuple

from raypkg.core.errors import UserError, redacted, unknown

from . import ROOT
from .folder import CONFIG, ENVIRONMENT, GROWING, NAME, SUMMARY, Manifest, RunFolder, read_settings
from .storage import PART, Storage

DONE = "done"
GOING = "going"  # a process holds its lock
STOPPED = "stopped"
UNFINISHED = "unfinished"  # going or stopped: object stores have no locks
UNITS = ((86400, "d"), (3600, "h"), (60, "min"))  # seconds, from the largest on
RECORD = "sweep.json"  # of a study
MARKS = {CONFIG, SUMMARY, ENVIRONMENT, GROWING}  # a run has at least one of these files
THREADS = 16  # object stores answer slowly, but many requests at once
STATES = {
    GOING: "a process is working on it",
    STOPPED: "no process is working on it",
    UNFINISHED: "and it is unknown whether a process is working on it: there are no locks here",
}


def find(root: str, experiment: str, name: str) -> RunFolder:
    """Open a run of an experiment by its name."""
    runs = Storage(root) / experiment
    if name not in runs.list():
        raise unknown(f"{experiment} run in {runs.root}", name, runs.list())
    return RunFolder(runs / name)


def locate(root: str, run: str, having: str | None = None) -> RunFolder:
    """Open a run of any experiment by its path, its name, or experiment/name.

    Of several runs of a name, it is the one that has the file ``having``; so is the one that the error for an unknown
    name suggests. A sweep, which has no such file, is refused.
    """
    runs = Storage(root)
    by_path = [Storage(run)] if run else []
    by_name: list[Storage] = []
    if all(NAME.fullmatch(part) for part in run.split("/")):  # a name, or experiment/name
        by_path.append(runs / run)
        by_name = [runs / kind / run for kind in runs.list() if _is_run(runs / kind / run)]
        by_name = [storage for storage in by_name if _is_run(storage, having)] or by_name
    found = [*filter(_is_run, by_path)][:1] or by_name
    if not found:
        everyone = [(kind, name) for kind in runs.list() for name in (runs / kind).list()]
        names = {name for kind, name in everyone if _is_run(runs / kind / name, having)}
        raise unknown(f"run in {root}", run, sorted(names))
    storage = _only(found, run)
    if having is not None and is_study(storage):
        raise UserError(f"{run} is a sweep, not a run: give one of its trials, which `effray show {run}` lists")
    return RunFolder(storage)


def _only(found: Sequence[Storage], run: str) -> Storage:
    """Return the only folder that a run's name stands for; refuse a name in several experiments."""
    if len(found) > 1:
        kinds = [storage.parent.name for storage in found]
        raise UserError(f"there is a run {run!r} of {' and of '.join(kinds)}: give {kinds[0]}/{run}, or another")
    return found[0]


def _is_run(storage: Storage, having: str | None = None) -> bool:
    files = storage.list()  # a finished run that lost its settings reports that itself
    return having in (None, *files) and (CONFIG in files or SUMMARY in files)


def is_study(storage: Storage) -> bool:
    """Return True if a folder is a study's."""
    return RECORD in storage.list()


# States


def state_of(storage: Storage) -> str:
    """Return the state of a run or study that is not done.

    The shared lock is held briefly; a process that starts work there retries.
    """
    if storage.local is None:
        return UNFINISHED
    try:
        folder = os.open(storage.local, os.O_RDONLY)
    except OSError:  # another user's, or deleted meanwhile
        return UNFINISHED
    try:
        fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return GOING
    except OSError:  # a file system without locks
        return UNFINISHED
    finally:
        os.close(folder)
    return STOPPED


def ago(moment: float) -> str:
    """Return the time since a moment, in one unit.

    >>> ago(time.time() - 3 * 3600 - 100)
    '3 h'
    """
    seconds = max(0, round(time.time() - moment))
    for size, unit in UNITS:
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def resuming(command: str, storage: Storage, root: str) -> str:
    """Return the command, without its options, that resumes a run or study; a default root is omitted.

    >>> resuming("effray lipt", Storage("/data/my runs/lipt/one"), "/data/my runs")
    "effray lipt --resume one --root '/data/my runs'"
    """
    again = f"{command} --resume {shlex.quote(storage.name)}"
    around = storage.parent.parent.root
    if around != Storage(root).root:  # the user gave the path of the run
        root = around
    return again if root == ROOT else f"{again} --root {shlex.quote(redacted(root))}"


# The list


class Listed(NamedTuple):
    """A run in the list of runs."""

    experiment: str
    name: str
    state: str  # or the name of a damaged file
    data: str = "–"
    model: str = "–"
    method: str = "–"  # the experiment, with its selection rule
    accuracy: float | None = None  # on the test samples
    backward: int | None = None  # samples back-propagated in all phases of a finished run
    seconds: float | None = None  # on the critical path of a finished run
    time: float = 0.0  # of the last write, in seconds since 1970


def runs_of(root: str, experiments: Iterable[str]) -> list[Listed]:
    """Return all runs of some experiments, in no order; other folders are skipped."""
    runs = Storage(root)
    kinds = set(runs.list()) & set(experiments)
    folders, closed = [], []
    for kind in kinds:
        try:
            folders += [runs / kind / name for name in (runs / kind).list()]
        except UserError:
            closed.append(unreadable(runs / kind))
    with ThreadPoolExecutor(THREADS) as pool:
        return [*closed, *(line for line in pool.map(_listed, folders) if line is not None)]


def unreadable(storage: Storage) -> Listed:
    """Return the line of a folder that cannot be read, such as another user's."""
    time = storage.local.lstat().st_mtime if storage.local else 0.0
    return Listed(storage.parent.name, storage.name, "unreadable", time=time)


def _listed(storage: Storage) -> Listed | None:
    """Return the line of a run, even of a damaged one, or None for another folder; read two small files."""
    try:
        times = storage.times()
    except UserError:  # another user's, or no folder
        return unreadable(storage) if storage.local and storage.local.is_dir() else None
    if not MARKS & times.keys():
        return None
    state = DONE if SUMMARY in times else state_of(storage)
    config: dict[str, Any] = {}
    try:
        config = read_settings(storage)
    except UserError:
        state = f"bad {CONFIG}"
    accuracy = backward = seconds = None
    if SUMMARY in times:
        try:
            summary: Any = storage.read_json(SUMMARY, Manifest)
            accuracy, seconds = summary.get("test_accuracy"), summary["seconds"]
            backward = sum(phase["backward"] for phase in summary["phases"])
        except UserError:
            state = f"bad {SUMMARY}"
    experiment = storage.parent.name
    select = config.get("select")
    inner = _rule_in(select) if isinstance(select, dict) else None
    chosen = inner or config.get("selection") or _rule_in(config) or experiment
    method = experiment if chosen == experiment else f"{experiment} {chosen}"
    data, model = named(config, "dataset"), named(config, "model")
    written = max(times.values())
    return Listed(experiment, storage.name, state, data, model, method, accuracy, backward, seconds, time=written)


def named(config: Mapping[str, Any], part: str) -> str:
    """Return the name in a part of stored settings, without the folder of a data set.

    >>> named({"dataset": {"name": "parquet:/data/cifar10"}}, "dataset")
    'cifar10'
    """
    chosen = config.get(part)
    name = chosen.get("name") if isinstance(chosen, dict) else None
    return str(name).rpartition("/")[2] if name else "–"


def _rule_in(settings: Mapping[str, Any]) -> Any:
    return settings.get("rule") or settings.get("method")  # the name in earlier versions


# Deletion


def to_delete(root: str, run: str) -> Storage:
    """Return the folder of a run or study to delete, given by name, experiment/name, path or URI; not yet checked.

    The remains of an interrupted deletion go by the run's name.
    """
    runs = Storage(root)
    parts = run.split("/")
    found: list[Storage] = []
    if len(parts) <= 2 and all(NAME.fullmatch(part) for part in parts):
        for kind in runs.list() if len(parts) == 1 else parts[:1]:
            around = runs / kind
            remains = around.local.glob(f"{escape(parts[-1])}.{'?' * 8}{PART}") if around.local else ()
            names = [parts[-1], *(path.name for path in remains)]
            found += [around / name for name in names if (around / name).taken][:1]
    if not found and "/" in run:
        found = [storage for storage in [Storage(run.rstrip("/"))] if storage.taken]
    if not found:
        raise unknown(f"run in {runs.root}", run, {name for kind in runs.list() for name in (runs / kind).list()})
    return _only(found, run)


def locked(folders: Iterable[Storage]) -> ExitStack:
    """Return the locks of several folders, or refuse if a process is working on one of them."""
    with ExitStack() as locks:
        for storage in folders:
            locks.enter_context(storage.locked(f"{storage.parent.name}/{storage.name}"))
        return locks.pop_all()


def remove(storage: Storage) -> None:
    """Delete the folder of a run or study; links in it are not followed.

    A local folder is renamed first, to a name beside it that is never listed. Its manifest goes first and its settings
    last: the remains of an interrupted deletion do not look like a run, but can be recognised as one's.
    """
    if storage.local and not storage.name.endswith(PART):
        hidden = storage.parent / f"{storage.name}.{uuid.uuid4().hex[:8]}{PART}"
        try:
            storage.local.rename(str(hidden.local))
        except OSError as error:
            raise UserError(f"cannot delete {str(storage.local)!r}: {error.strerror or error}") from None
        storage = hidden
    if SUMMARY in storage.list():
        storage.delete(SUMMARY)
    storage.delete_folder(last=CONFIG)

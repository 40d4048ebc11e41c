"""Whether a run is done, going or stopped, when it was last written to, and the command that resumes it."""

import fcntl
import os
import shlex
import time

from pyarrow import fs

from raypkg.core.address import opened, parted
from raypkg.core.errors import UserError, redacted

from . import ROOT
from .storage import Storage

DONE = "done"
GOING = "going"  # a process holds its lock
STOPPED = "stopped"
UNFINISHED = "unfinished"  # going or stopped: an object store has no locks that would tell
UNITS = ((86400, "d"), (3600, "h"), (60, "min"))  # seconds, from the largest on


def state_of(storage: Storage) -> str:
    """Return the state of a run or sweep that is not done.

    The lock is shared with others who ask, and held for a moment, which who starts work there waits for.
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


def written(root: str, *names: str, below: bool = False) -> dict[str, float]:
    """Return when each file of a folder was last written, in seconds since 1970, by its path.

    Args:
        root: a path or URI.
        names: of folders below it, which are never read as part of a URI.
        below: files in folders within the folder as well.

    Raises:
        UserError: the folder cannot be listed.
    """
    base, others = parted(root)
    system, path = opened(base)
    folder = "/".join([path, *others, *names])
    selector = fs.FileSelector(folder, allow_not_found=True, recursive=below)
    try:
        entries = system.get_file_info(selector)
    except OSError as error:
        raise UserError(f"cannot list {folder!r}: {error.strerror or error}") from None
    files = [entry for entry in entries if entry.type == fs.FileType.File and entry.mtime is not None]
    return {entry.path.removeprefix(folder).lstrip("/"): entry.mtime.timestamp() for entry in files}


def ago(moment: float) -> str:
    """Return how long ago a moment was, in one unit.

    >>> ago(time.time() - 3 * 3600 - 100)
    '3 h'
    """
    seconds = max(0, round(time.time() - moment))
    for size, unit in UNITS:
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def resuming(command: str, storage: Storage, root: str) -> str:
    """Return the command that resumes a run or sweep.

    Args:
        command: that began it, without options.
        storage: the folder of the run or sweep, which is below the folder of its kind.
        root: of all runs, as the user gave it; it is told only where it is not the default.

    >>> resuming("effray lipt", Storage("/data/my runs/lipt/one"), "/data/my runs")
    "effray lipt --resume one --root '/data/my runs'"
    """
    again = f"{command} --resume {shlex.quote(storage.name)}"
    around = storage.parent.parent.root
    if around != Storage(root).root:  # it was given by its path
        root = around
    return again if root == ROOT else f"{again} --root {shlex.quote(redacted(root))}"

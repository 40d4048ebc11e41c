"""Deleting run folders, so that none is ever left half there and looking whole.

A local folder is renamed first, to a name that nothing lists; its manifest and settings go before the rest. Links are
unlinked, and what they lead to stays.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from raypkg.core.errors import UserError, unknown

from .folder import NAME
from .listing import SUMMARY
from .sealed import CONFIG, SEAL
from .storage import PART, Storage

OURS = "environment.json"  # every run begins with it; settings with their seal do as well


def doomed(root: str, run: str) -> Storage:
    """Return the folder of a run or sweep that is to be deleted.

    A name is one below the root, whatever is in the working folder; anything with a slash may be a path. What a
    deletion that was cut short has left of a run goes by the run's name.

    Args:
        root: of all runs.
        run: its name, experiment/name, or the path or URI of its folder.

    Raises:
        UserError: no such run, several, or a folder that effray has not made.
    """
    runs = Storage(root)
    parts = run.split("/")
    found: list[Storage] = []
    if len(parts) <= 2 and all(NAME.fullmatch(part) for part in parts):
        kinds = runs.list() if len(parts) == 1 else parts[:1]
        found = [runs / kind / name for kind in kinds for name in _names(runs / kind, parts[-1])]
    if not found and "/" in run:
        found = [Storage(run.rstrip("/"))]
    found = [storage for storage in found if _is_there(storage)]
    if not found:
        raise unknown(f"run in {runs.root}", run, {name for kind in runs.list() for name in (runs / kind).list()})
    if len(found) > 1:
        kinds = [storage.parent.name for storage in found]
        raise UserError(f"there is a run {run!r} of {' and of '.join(kinds)}: give {kinds[0]}/{run}, or another")
    _check_is_ours(found[0])
    return found[0]


@contextmanager
def held(folders: Iterable[Storage]) -> Iterator[None]:
    """Hold the locks of folders.

    Raises:
        UserError: a process is working on one of them.
    """
    with ExitStack() as locks:
        for storage in folders:
            locks.enter_context(storage.alone(f"{storage.parent.name}/{storage.name}"))
        yield


def remove(storage: Storage) -> None:
    """Delete the folder of a run or sweep, and the folder around it where nothing else is there.

    Raises:
        UserError: the file system refuses.
    """
    around = storage.parent
    if storage.local and not storage.name.endswith(PART):
        storage = _renamed(storage)
    if not (storage.local and storage.local.is_symlink()):
        names = storage.list()
        for file in (SUMMARY, CONFIG):
            if file in names:
                storage.delete(file)
    storage.delete_folder("")
    around.delete_if_empty()


def _renamed(storage: Storage) -> Storage:
    """Give a local folder a name that nothing lists, once what an earlier deletion has left there is gone."""
    hidden = storage.parent / f"{storage.name}{PART}"
    hidden.delete_folder("")
    try:
        os.rename(str(storage.local), str(hidden.local))
    except OSError as error:
        raise UserError(f"cannot delete {str(storage.local)!r}: {error.strerror or error}") from None
    return hidden


def _names(runs: Storage, name: str) -> Sequence[str]:
    """Return the name of a run among others if it is there, or else that of what is left of it."""
    if name in runs.list():
        return [name]
    left = f"{name}{PART}"
    return [left] if runs.local and (runs.local / left).is_dir() else []


def _is_there(storage: Storage) -> bool:
    return bool(storage.list()) or storage.name.endswith(PART)


def _check_is_ours(storage: Storage) -> None:
    """Refuse a folder that no run has made: any may hold a file of the name config.toml."""
    if storage.name.endswith(PART) and NAME.fullmatch(storage.name):
        return
    settings = storage.read(CONFIG) or b""
    is_ours = OURS in storage.list() or settings.startswith(SEAL.encode())
    if not (is_ours and NAME.fullmatch(storage.name)):
        raise UserError(f"{storage.root!r} is no folder of a run or sweep: effray deletes none that it has not made")

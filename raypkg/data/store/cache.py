"""The cache folder: a store is built once, by one process, and appears whole or not at all."""

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from platform import node

import pyarrow as pa

from raypkg.core.errors import UserError
from raypkg.data.files import Place, identity_of, relisted

from .arrow import FORMAT, Store

log = logging.getLogger(__name__)
TOLD = 1 << 30  # bytes from which on an import is told of


def cached(path: Path, build: Callable[[Path], None], files: Collection[Place] = ()) -> Store:
    """Open the store at ``path``; if it is missing or damaged, one process builds it and the others wait.

    Args:
        path: of the store.
        build: writes it to the path that it is given.
        files: that it reads, which must be the same afterwards.

    Raises:
        UserError: the cache cannot be written (the disk is full, …); its source cannot be read or has changed.
    """
    store = _opened(path)  # without the lock: a finished cache may lie on a read-only disk
    if store:
        return store
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            return _opened(path, report=True) or _built(path, build, files)
    except OSError as error:
        raise UserError(f"cannot build the data cache {str(path)!r} on {node()}: {error}") from error


def cache_folder(cache: Path | None = None) -> Path:
    """Return the given folder, else ``$EFFRAY_CACHE``, else ``effray`` in the user's cache folder."""
    if cache:
        return cache
    if chosen := os.environ.get("EFFRAY_CACHE"):
        return Path(chosen)
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "effray"


def store_path(cache: Path | None, name: str, key: str, split: str) -> Path:
    """Return the file of a split's store: the source's name is for people, its fingerprint tells sources apart."""
    return cache_folder(cache) / f"{name}-{split}-{key}.arrow"


def fingerprint(files: Iterable[Place], **options: object) -> str:
    """Return a short name of the source: files with their sizes and times, options and the store's format."""
    states = [tuple(identity_of(file)) for file in files]  # plain: stores made before are still found
    identity = repr((FORMAT, states, sorted(options.items())))
    return blake2b(identity.encode(), digest_size=8).hexdigest()


def _opened(path: Path, report: bool = False) -> Store | None:
    try:
        return Store(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        if report:
            log.warning("the data cache %s is damaged and is built again: %s", path, error)
        return None


def check_fits(path: Path, size: int) -> None:
    """Refuse to write more bytes than the disk of a store has room for; tell of an import that takes long.

    Raises:
        UserError: the disk is too small.
    """
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise UserError(
            f"the data cache {str(path.parent)!r} on {node()} has {free / 1e9:.1f} GB of room, this data set takes"
            f" {size / 1e9:.1f} GB: name a folder on a larger disk in EFFRAY_CACHE"
        )
    if size >= TOLD:
        log.warning("importing %.1f GB into %s, once for this machine", size / 1e9, path.parent)


def _built(path: Path, build: Callable[[Path], None], files: Collection[Place]) -> Store:
    unfinished = path.with_suffix(".tmp")  # one name is enough: the lock is held
    before = [identity_of(file) for file in files]
    try:
        build(unfinished)
        for file, state in zip(relisted(files), before, strict=True):
            if identity_of(file) != state:
                raise UserError(f"{str(file)!r} changed while it was imported: run the command again")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return Store(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield

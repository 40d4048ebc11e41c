"""The cache folder: a store is built once, by one process, and appears whole or not at all."""

import fcntl
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa

from raypkg.core.errors import UserError

from .arrow import FORMAT, Store

log = logging.getLogger(__name__)


def cached(path: Path, build: Callable[[Path], None]) -> Store:
    """Open the store at ``path``; if it is missing or damaged, one process builds it and the others wait.

    Raises:
        UserError: the cache cannot be written (the disk is full, …) or its source cannot be read.
    """
    store = _opened(path)  # without the lock: a finished cache may lie on a read-only disk
    if store:
        return store
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            return _opened(path, report=True) or _built(path, build)
    except OSError as error:
        raise UserError(f"cannot build the data cache {str(path)!r}: {error}") from error


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


def fingerprint(files: Iterable[Path], **options: object) -> str:
    """Return a short name of the source: files with their sizes and times, options and the store's format."""
    states = [_state(file) for file in files]
    identity = repr((FORMAT, states, sorted(options.items())))
    return blake2b(identity.encode(), digest_size=8).hexdigest()


def _state(file: Path) -> tuple[str, int, int]:
    stat = file.stat()
    return str(file.resolve()), stat.st_size, stat.st_mtime_ns


def _opened(path: Path, report: bool = False) -> Store | None:
    try:
        return Store(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        if report:
            log.warning("the data cache %s is damaged and is built again: %s", path, error)
        return None


def _built(path: Path, build: Callable[[Path], None]) -> Store:
    unfinished = path.with_suffix(".tmp")  # one name is enough: the lock is held
    try:
        build(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return Store(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield

"""The cache folder: a store is built once, by one process, and appears complete or not at all."""

import fcntl
import logging
import os
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path
from platform import node

from raypkg.core.address import is_uri
from raypkg.core.errors import UserError
from raypkg.core.memory import check_cache_room
from raypkg.data.files import Place, identity_of

from . import arrow
from .arrow import FORMAT, Block, Header, Store, Stored
from .parts import DAMAGE, Stream, tidy, write_streamed
from .streamed import Streamed

Cache = Path | Stream | None  # location of all stores: a folder of this machine (default: the user's), or a Stream
Target = Path | Stream  # location of one store

log = logging.getLogger(__name__)
ANNOUNCED = 1 << 30  # bytes of an import that is announced


def cache_folder(cache: Cache = None) -> Path:
    """Return the given folder, else ``$EFFRAY_CACHE``, else ``effray`` in the user's cache folder."""
    if isinstance(cache, Stream):
        return cache.cache
    if isinstance(cache, Path):
        return cache
    if chosen := os.environ.get("EFFRAY_CACHE"):
        if is_uri(chosen):
            raise UserError(f"EFFRAY_CACHE = {chosen}: the cache is a local folder, whose files are mapped into memory")
        return Path(chosen)
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "effray"


def store_path(cache: Cache, name: str, key: str, split: str) -> Target:
    """Return the location of a split's store; the source's name is for people, its fingerprint identifies it."""
    store = f"{name}-{split}-{key}"
    if isinstance(cache, Stream):
        return cache._replace(name=store)
    return cache_folder(cache) / f"{store}.arrow"


def fingerprint(files: Iterable[Place], **options: object) -> str:
    """Return a short digest of a source: its files with sizes and times, options, and the store's format."""
    identity = repr((FORMAT, [identity_of(file) for file in files], sorted(options.items())))
    return blake2b(identity.encode(), digest_size=8).hexdigest()


def cached(target: Target, build: Callable[[Target], None]) -> Stored:
    """Open a store, building it first if it is missing or damaged.

    One process of a machine builds a local file while the others wait. A store that is read by blocks is built by each
    process that finds none; all write the same bytes. ``build`` writes the store to the target that it is given.
    """
    if store := _opened(target):  # without the lock: a finished cache may be on a read-only disk
        return store
    if isinstance(target, Stream):
        return _built_stream(target, build)
    path = target
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
            if store := _opened(path, report=True):
                return store
            unfinished = path.with_suffix(".tmp")  # one name suffices: the lock is held
            try:
                build(unfinished)
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
            return Store(path)
    except OSError as error:
        raise UserError(f"cannot build the data cache {str(path)!r} on {node()}: {error}") from error


def _opened(target: Target, report: bool = False) -> Stored | None:
    try:
        return Streamed(target) if isinstance(target, Stream) else Store(target)
    except FileNotFoundError:
        return None
    except (OSError, *DAMAGE) as error:
        is_streamed = isinstance(target, Stream)
        if is_streamed and isinstance(error, OSError):
            raise UserError(f"the store {str(target)!r} cannot be read: {error}") from None
        if report or is_streamed:  # a local file is opened once more, with the lock
            what = "store" if is_streamed else "data cache"
            log.warning("the %s %s is damaged and is built again: %s", what, target, error)
        return None


def _built_stream(stream: Stream, build: Callable[[Target], None]) -> Stored:
    failure: OSError | str = "its files have just been deleted"
    try:
        build(stream)
    except OSError as error:  # perhaps only because another process has finished the store
        failure = error
    if not (store := _opened(stream)):
        raise UserError(f"cannot build the store {str(stream)!r}: {failure}")
    tidy(stream)  # leftovers of writers that were killed or late
    return store


def write_store(target: Target, header: Header, blocks: Iterable[Block], size: int = 0) -> None:
    """Write a store of ``size`` bytes, if known."""
    if isinstance(target, Stream):
        write_streamed(target, header, blocks)
        return
    folder = target.parent
    check_cache_room(folder, size, "this data set")
    if size >= ANNOUNCED:
        log.warning("importing %.1f GB into %s, once for this machine", size / 1e9, folder)
    arrow.write(target, header, blocks)

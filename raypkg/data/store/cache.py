"""The cache folder: a store is built once, by one process, and appears complete or not at all."""

import fcntl
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from platform import node
from typing import TypeVar

from raypkg.core.address import is_uri
from raypkg.core.errors import UserError
from raypkg.core.memory import check_cache_room
from raypkg.data.files import Place, identity_of, relisted

from . import arrow
from .arrow import FORMAT, Block, Header, Store, Stored
from .streamed import DAMAGE, INDEX, From, Stream, Streamed, named_at_end, tidy, write_streamed

Cache = Path | Stream | None  # location of all stores: a folder of this machine (default: the user's), or a Stream
Target = Path | Stream  # location of one store

log = logging.getLogger(__name__)
T = TypeVar("T")
ANNOUNCED = 1 << 30  # bytes of an import that is announced


class SourceChanged(UserError):
    """A file changed while it was imported."""


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


def cached(target: Target, build: Callable[[Target], None], files: Collection[Place] = ()) -> Stored:
    """Open a store, building it first if it is missing or damaged.

    One process of a machine builds a local file while the others wait. A store that is read by blocks is built by each
    process that finds none, resuming from existing parts; all write the same bytes.

    ``build`` writes the store to the target that it is given. The source ``files`` must be unchanged afterwards.
    """
    if store := _opened(target):  # without the lock: a finished cache may be on a read-only disk
        return store
    if isinstance(target, Path):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
                if store := _opened(target, report=True):
                    return store
                unfinished = target.with_suffix(".tmp")  # one name suffices: the lock is held
                try:
                    with _unchanged(files):
                        build(unfinished)
                    os.replace(unfinished, target)
                finally:
                    unfinished.unlink(missing_ok=True)
                return Store(target)
        except OSError as error:
            raise UserError(f"cannot build the data cache {str(target)!r} on {node()}: {error}") from error

    failure: OSError | str = "its files have just been deleted"
    try:
        # The index gets its name at the end, which makes the store valid; on an error, its parts are kept.
        with named_at_end(target, lambda: INDEX) as index, _unchanged(files):
            build(target._replace(index_file=index))
    except SourceChanged:
        tidy(target)  # its parts may hold either state of the source
        raise
    except OSError as error:  # perhaps only because another process has finished the store
        failure = error
    if not (store := _opened(target)):
        raise UserError(f"cannot build the store {str(target)!r}: {failure}")
    tidy(target)  # notes, and leftovers of writers that were killed or late
    return store


def stored(
    cache: Cache,
    name: str,
    split: str,
    files: Collection[Place],
    build: Callable[[], tuple[Header, Iterable[Block]]],
    **options: object,
) -> Stored:
    """Open the store of a split, or build it from samples that can only be read from their beginning.

    The source's name is for people; its ``files`` and the ``options`` that decide its samples identify the store.
    """

    def write(target: Target) -> None:
        header, blocks = build()
        write_store(target, header, lambda start: beginning_at(start, blocks, lambda block: len(block.y)))

    return cached(store_path(cache, name, fingerprint(files, **options), split), write, files)


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


@contextmanager
def _unchanged(files: Collection[Place]) -> Iterator[None]:
    """Refuse files that change while they are read."""
    before = [identity_of(file) for file in files]

    def check() -> None:
        for file, state in zip(relisted(files), before, strict=True):
            if identity_of(file) != state:
                raise SourceChanged(f"{str(file)!r} changed while it was imported: run the command again")

    try:
        yield
    except Exception as error:  # may be a mere consequence of the change
        try:
            check()
        except SourceChanged as change:
            raise change from error
        except (OSError, UserError):
            pass  # the first error says more
        raise
    check()


def write_store(target: Target, header: Header, blocks: From, size: int = 0) -> None:
    """Write a store of ``size`` bytes, if known; ``blocks(start)`` yields the samples from ``start`` on."""
    if isinstance(target, Stream):
        write_streamed(target, header, blocks)
        return
    folder = target.parent
    check_cache_room(folder, size, "this data set")
    if size >= ANNOUNCED:
        log.warning("importing %.1f GB into %s, once for this machine", size / 1e9, folder)
    arrow.write(target, header, blocks(0))


def beginning_at(start: int, runs: Iterable[T], length: Callable[[T], int]) -> Iterator[T]:
    """Skip the runs of samples before ``start``, which begins a run unless another version cut them otherwise."""
    passed = 0
    for run in runs:
        if passed >= start:
            yield run
        passed += length(run)
        if passed - length(run) < start < passed:
            raise UserError("the import that was killed ended within a block, as by another version: delete its folder")

"""The cache folder: a store is built once, by one process, and appears whole or not at all."""

import fcntl
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from platform import node

from raypkg.core.errors import UserError
from raypkg.data.files import Identity, Place, identity_of, relisted
from raypkg.data.memory import check_cache_room

from . import arrow
from .arrow import Store
from .importing import From, beginning_at, begun, published, write_streamed
from .parts import DAMAGE, Stream, tidy
from .stored import FORMAT, Block, Header, Stored
from .streamed import Streamed

Cache = Path | Stream | None  # where stores lie: in a folder of this machine, by default the user's, or elsewhere
Target = Path | Stream  # one store

log = logging.getLogger(__name__)
TOLD = 1 << 30  # bytes from which on an import is told of


class SourceChanged(UserError):
    """A file changed while it was imported."""


def cached(target: Target, build: Callable[[Target], None], files: Collection[Place] = ()) -> Stored:
    """Open a store; if it is missing or damaged, it is built.

    Of the processes of a machine one builds a file of this machine, while the others wait. A store that is read by
    blocks is built by each that finds none, from what there is of it: all write the same.

    Args:
        target: the store.
        build: writes it to the target that it is given.
        files: that it reads, which must be the same afterwards.

    Raises:
        UserError: the cache cannot be written (the disk is full, …); its source cannot be read or has changed.
    """
    if isinstance(target, Stream):
        return _streamed(target, build, files)
    path = target
    store = _opened(path)  # without the lock: a finished cache may lie on a read-only disk
    if store:
        return store
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            return _opened(path, report=True) or _built(path, build, files)
    except OSError as error:
        raise UserError(f"cannot build the data cache {str(path)!r} on {node()}: {error}") from error


def write_store(target: Target, header: Header, blocks: Iterable[Block], size: int = 0) -> None:
    """Write a store of samples that are read from their beginning; see :func:`write_store_from`."""

    def rest(start: int) -> Iterator[Block]:
        return beginning_at(start, blocks, lambda block: len(block.y))

    write_store_from(target, header, rest, size)


def write_store_from(target: Target, header: Header, blocks: From, size: int = 0) -> None:
    """Write a store, of which a part may be there.

    Args:
        target: the file, or a store that is read by blocks.
        header: what the samples are.
        blocks: gives the samples from one on.
        size: the bytes that they will take, as far as that is known.

    Raises:
        UserError: this machine's disk is too small.
    """
    if isinstance(target, Stream):
        write_streamed(target, header, blocks)
    else:
        folder = target.parent
        check_cache_room(folder, size, "this data set")
        if size >= TOLD:
            log.warning("importing %.1f GB into %s, once for this machine", size / 1e9, folder)
        arrow.write(target, header, blocks(0))


def begun_header(target: Target) -> Header | None:
    """Return what an import that was killed has taken the samples for; None where it left nothing to go on from."""
    return begun(target) if isinstance(target, Stream) else None


def cache_folder(cache: Cache = None) -> Path:
    """Return the given folder, else ``$EFFRAY_CACHE``, else ``effray`` in the user's cache folder."""
    if isinstance(cache, Stream):
        return cache.cache
    if isinstance(cache, Path):
        return cache
    if chosen := os.environ.get("EFFRAY_CACHE"):
        return Path(chosen)
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "effray"


def store_path(cache: Cache, name: str, key: str, split: str) -> Target:
    """Return where a split's store lies: the source's name is for people, its fingerprint tells sources apart."""
    store = f"{name}-{split}-{key}"
    if isinstance(cache, Stream):
        return cache._replace(name=store)
    return cache_folder(cache) / f"{store}.arrow"


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
    except (OSError, *DAMAGE) as error:
        if report:
            log.warning("the data cache %s is damaged and is built again: %s", path, error)
        return None


def _built(path: Path, build: Callable[[Target], None], files: Collection[Place]) -> Store:
    unfinished = path.with_suffix(".tmp")  # one name is enough: the lock is held
    try:
        with _unchanged(files):
            build(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return Store(path)


@contextmanager
def _unchanged(files: Collection[Place]) -> Iterator[None]:
    """Refuse files that change while they are read."""
    before = [identity_of(file) for file in files]
    try:
        yield
    except Exception as error:  # which may be but a consequence
        file = None
        with suppress(OSError, UserError):
            file = _changed(files, before)
        if file:
            raise _refusal(file) from error
        raise
    file = _changed(files, before)
    if file:
        raise _refusal(file)


def _changed(files: Collection[Place], before: Iterable[Identity]) -> Place | None:
    """Return a file that is not as it was."""
    pairs = zip(relisted(files), before, strict=True)
    return next((file for file, state in pairs if identity_of(file) != state), None)


def _refusal(file: Place) -> SourceChanged:
    return SourceChanged(f"{str(file)!r} changed while it was imported: run the command again")


def _streamed(stream: Stream, build: Callable[[Target], None], files: Collection[Place]) -> Streamed:
    """Open a store that is read by blocks, which is built if it is missing or damaged."""
    store = _opened_stream(stream)
    if store:
        return store
    failure: OSError | str = "its files have just been deleted"
    try:
        with published(stream) as unfinished, _unchanged(files):
            build(unfinished)
    except SourceChanged:
        tidy(stream)  # its parts may be of either state
        raise
    except OSError as error:  # perhaps only because another process has finished it
        failure = error
    store = _opened_stream(stream)
    if not store:
        raise UserError(f"cannot build the store {str(stream)!r}: {failure}")
    tidy(stream)  # what it needs no more, and what others that died or came late have left
    return store


def _opened_stream(stream: Stream) -> Streamed | None:
    try:
        return Streamed(stream)
    except FileNotFoundError:
        return None
    except DAMAGE as error:
        log.warning("the store %s is damaged and is built again: %s", stream, error)
        return None
    except OSError as error:
        raise UserError(f"the store {str(stream)!r} cannot be read: {error}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield

"""Stores that are read by blocks, such as from a bucket, and their resumable import.

No machine holds more than a window of such a store. It is a folder of its own, with the files

NUMBER-DIGEST.blocks    a part: record batches of the store, each an IPC message, one after another
NUMBER-DIGEST.part      its note: resume metadata, deleted when the store is complete
index                   written last, makes the store valid: labels and ids, header, statistics, parts

A file appears complete, under a name that identifies its contents: any other writer of that name writes the same. A
part ends where a block of the source does, and its note holds the state of the statistics. So its bytes depend on the
source alone, whichever process writes it and however often the import is interrupted.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate, chain, pairwise
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa
import torch
from pyarrow import fs

from raypkg.core.address import address_of, opened, parted
from raypkg.core.errors import UserError
from raypkg.core.memory import check_cache_room, check_memory
from raypkg.data.files import READERS, fetched
from raypkg.data.kinds import Moments
from raypkg.data.split import Blocks, Split, Take

from .arrow import Block, Gather, Header, Store, Stored, merged_batches, record_batches, write_batches

BLOCKS = ".blocks"
NOTE = ".part"
INDEX = "index"
DIGEST = 16  # characters
DAMAGE = (ValueError, KeyError, TypeError, pa.ArrowException)  # raised when a damaged file is read
BLOCK_BYTES = 8 << 20  # the latency of a request to an object store equals the transfer of some megabytes
PART_BYTES = 1 << 30  # bounds, with one block of the source, the work that is repeated after an interruption
COPIED_BYTES = 64 << 20  # of a copy's record batches
OPEN = 256  # files kept open per process

From = Callable[[int], Iterable[Block]]  # samples from one on, in the same blocks for every start

log = logging.getLogger(__name__)


class Stream(NamedTuple):
    """Location of stores that are read by blocks, or of one of them."""

    address: str  # folder or URI that contains all of them
    window: int  # number of blocks that training batches draw from at a time
    cache: Path  # folder of this machine, for copies of some samples
    name: str = ""  # of one store
    index_file: str = INDEX  # another name until the store is complete

    def __str__(self) -> str:
        return address_of(self.address, [self.name])

    def folder(self) -> tuple[fs.FileSystem, str]:
        """Return the file system of the store, and its folder there."""
        base, below = parted(self.address)
        system, path = opened(base)
        return system, "/".join([path, *below, self.name])


class StoredPart(NamedTuple):
    """A file of consecutive blocks."""

    name: str  # of the file, without its ending
    starts: list[int]  # first byte of each block, and the end
    sizes: list[int]  # samples of each block
    digests: list[str]  # of the bytes of each block


class Note(NamedTuple):
    """Resume metadata of a part."""

    part: StoredPart
    before: str  # name of the previous part; "" for the first
    header: Header  # of the store
    columns: pa.Table  # labels and ids of its samples
    moments: dict[str, Any]  # state of the statistics after it


# Import


def write_streamed(stream: Stream, header: Header, blocks: From) -> None:
    """Write a store, one block in memory at a time; parts of an interrupted import are kept.

    Raises OSError if another process has meanwhile completed the store.
    """
    system, folder = stream.folder()
    system.create_dir(folder)
    sizes = sizes_in(stream)
    was_there = INDEX in sizes  # a damaged index
    header = Header.of(header.schema)  # as it is read back, for comparison
    notes: list[Note] = []

    def follows(note: Note) -> bool:
        before = notes[-1].part.name if notes else ""
        is_whole = sizes.get(note.part.name + BLOCKS) == note.part.starts[-1]
        return is_whole and note.before == before and note.header == header

    while following := [note for note in _notes(stream, len(notes), sizes) if follows(note)]:
        notes.append(following[0])
    start = sum(len(note.columns) for note in notes)
    if notes:
        log.warning("going on with the import of %s at sample %d", stream, start)
    moments = Moments(notes[-1].moments if notes else None)
    ahead = iter(blocks(start))
    for first in ahead:
        if not was_there and INDEX in sizes_in(stream):
            raise FileExistsError("another process has written it")
        before = notes[-1].part.name if notes else ""
        part, columns = _write_part(stream, len(notes), header, chain([first], ahead), moments)
        notes.append(Note(part, before, header, columns, moments.state))
        write_note(stream, notes[-1])
    facts = {"mean": moments.mean, "std": moments.std, "parts": [note.part._asdict() for note in notes]}
    columns = pa.concat_tables([note.columns.replace_schema_metadata(header.schema.metadata) for note in notes])
    write_columns(stream, stream.index_file, columns, facts)
    pa.default_memory_pool().release_unused()  # buffers of the import


def _write_part(
    stream: Stream, number: int, header: Header, blocks: Iterable[Block], moments: Moments
) -> tuple[StoredPart, pa.Table]:
    """Write blocks up to the size of a part; return the part and the other columns of its samples."""
    digests: list[str] = []
    lengths: list[int] = []  # of the messages, bytes
    columns: list[pa.RecordBatch] = []

    def bounded() -> Iterator[Block]:
        size = 0
        for block in blocks:
            yield block
            size += sum(map(len, block.x)) if isinstance(block.x, list) else block.x.nbytes
            if size >= PART_BYTES:
                return

    def part() -> StoredPart:
        name = f"{number:05}-{digest_of(''.join(digests).encode())}"
        return StoredPart(name, [*accumulate(lengths, initial=0)], [*map(len, columns)], digests)

    # A whole part of this name is kept, as other processes may be reading it.
    with appearing(stream, lambda: None if is_whole(stream, part()) else part().name + BLOCKS) as sink:
        for batch in record_batches(header.schema, bounded(), moments, BLOCK_BYTES):
            # A batch that exceeds a block is cut; a sample is never divided.
            pieces = -(-batch.nbytes // BLOCK_BYTES)
            rows = max(1, len(batch) // max(1, pieces))
            for start in range(0, len(batch), rows):
                piece = batch.slice(start, rows)
                message = piece.serialize()
                sink.write(message)
                digests.append(digest_of(message))
                lengths.append(message.size)
                columns.append(piece.drop_columns(["x"]))
    return part(), pa.Table.from_batches(columns)


def begun_header(target: Path | Stream) -> Header | None:
    """Return the header of an interrupted import that can be resumed, if there is one."""
    if isinstance(target, Path):
        return None
    # Of two headers, the one with fewer channels was written before a colour image was found.
    headers = [note.header for note in _notes(target, 0, sizes_in(target))]
    return max(headers, key=lambda header: header.shape[0], default=None)


def tidy(stream: Stream) -> None:
    """Delete files that do not belong to the store, or all files if it has no index.

    Files that another process is writing are deleted too: with an index, that process finds a complete store.
    """
    system, folder = stream.folder()
    with suppress(OSError):
        try:
            used = {INDEX, *(part.name + BLOCKS for part in parts_of(read_columns(stream, INDEX)))}
        except (FileNotFoundError, *DAMAGE):
            used = set()
        for name in sizes_in(stream).keys() - used:
            with suppress(OSError):
                system.delete_file(f"{folder}/{name}")
        if not used and not sizes_in(stream):
            system.delete_dir(folder)


def _notes(stream: Stream, number: int, names: Iterable[str]) -> list[Note]:
    """Return the intact notes of a part number: more than one if images turned out to have colour."""
    notes = []
    for name in sorted(names):
        if not name.startswith(f"{number:05}-") or not name.endswith(NOTE):
            continue
        with suppress(*DAMAGE):
            columns = read_columns(stream, name)
            part, before, moments = (fact_of(columns, each) for each in ("part", "before", "moments"))
            notes.append(Note(StoredPart(**part), before, Header.of(columns.schema), columns, moments))
    return notes


def write_note(stream: Stream, note: Note) -> None:
    """Write the note of a part."""
    facts = {"part": note.part._asdict(), "before": note.before, "moments": note.moments}
    write_columns(stream, note.part.name + NOTE, note.columns, facts)


# Files


def write_columns(stream: Stream, name: str, columns: pa.Table, facts: dict[str, Any]) -> None:
    """Write labels and ids to a file with a digest; ``facts`` become metadata, as JSON."""
    noted = {key: json.dumps(value) for key, value in facts.items()}
    table = columns.replace_schema_metadata({**columns.schema.metadata, **noted}).combine_chunks()
    content = pa.BufferOutputStream()
    with pa.ipc.new_file(content, table.schema) as writer:
        writer.write_table(table)
    body = content.getvalue()
    with appearing(stream, lambda: name) as sink:
        sink.write(body)
        sink.write(digest_of(body).encode())


def read_columns(stream: Stream, name: str) -> pa.Table:
    """Read labels and ids of a file, with the facts in the metadata; raises ArrowInvalid if it is damaged."""
    system, folder = stream.folder()
    with system.open_input_file(f"{folder}/{name}") as file:
        content = memoryview(file.read())
    body = content[:-DIGEST]
    if digest_of(body).encode() != content[-DIGEST:]:
        raise pa.ArrowInvalid(f"its file {name} is damaged")
    return pa.ipc.open_file(pa.py_buffer(body)).read_all()


def digest_of(content: Any) -> str:
    """Return a digest of some bytes, which detects damage."""
    return blake2b(content, digest_size=DIGEST // 2).hexdigest()


def fact_of(columns: pa.Table, name: str) -> Any:
    """Return a fact that was written with some columns; raises KeyError if it is missing."""
    return json.loads(columns.schema.metadata[name.encode()])


def parts_of(index: pa.Table) -> list[StoredPart]:
    """Return the parts listed in an index."""
    return [StoredPart(**fields) for fields in fact_of(index, "parts")]


def sizes_in(stream: Stream) -> dict[str, int]:
    """Return the size of each file in the folder of a store, with one request per thousand files."""
    system, folder = stream.folder()
    try:
        # allow_not_found would fail for a folder that is created at this moment.
        entries = system.get_file_info(fs.FileSelector(folder))
    except FileNotFoundError:
        return {}
    return {entry.base_name: entry.size for entry in entries if entry.type == fs.FileType.File}


def is_whole(stream: Stream, part: StoredPart) -> bool:
    """Return True if the file of a part exists with every byte intact."""
    system, folder = stream.folder()
    try:
        with system.open_input_file(f"{folder}/{part.name}{BLOCKS}") as file:
            blocks = zip(pairwise(part.starts), part.digests, strict=True)
            return file.size() == part.starts[-1] and all(
                digest_of(file.read_at(end - start, start)) == digest for (start, end), digest in blocks
            )
    except FileNotFoundError:
        return False


@contextmanager
def appearing(stream: Stream, name: Callable[[], str | None]) -> Iterator[pa.NativeFile]:
    """Open a file for writing that gets its name at the end of the block, and is deleted on an error or without one.

    Object stores need this too: after an error pyarrow still creates an object of the bytes written so far.
    """
    system, folder = stream.folder()
    with named_at_end(stream, name) as unfinished, system.open_output_stream(f"{folder}/{unfinished}") as sink:
        yield sink


@contextmanager
def named_at_end(stream: Stream, name: Callable[[], str | None]) -> Iterator[str]:
    """Yield the name, unique to this writer, under which to write a file that gets ``name()`` at the end."""
    system, folder = stream.folder()
    unfinished = f"{uuid4().hex}.tmp"
    try:
        yield unfinished
        if (final := name()) is None:
            system.delete_file(f"{folder}/{unfinished}")
        else:
            system.move(f"{folder}/{unfinished}", f"{folder}/{final}")
    except BaseException:  # Ctrl-C as well
        with suppress(OSError):
            system.delete_file(f"{folder}/{unfinished}")
        raise


# Reading


class Place(NamedTuple):
    """Location of a block."""

    file: str
    start: int  # byte
    size: int  # bytes
    digest: str


class Streamed(Stored):
    """An open store that is read by blocks. It pickles as its address.

    Raises ArrowInvalid if its index is damaged or of another format, or if its parts differ from those in the index.
    """

    def __init__(self, stream: Stream):
        self.stream = stream
        self.name = str(stream)
        index = read_columns(stream, stream.index_file)
        self.header = Header.of(index.schema)
        self.mean, self.std = (tuple(fact_of(index, name)) for name in ("mean", "std"))
        self.y = torch.from_numpy(index["y"].to_numpy().copy())
        self.ids = torch.from_numpy(index["id"].to_numpy().copy()) if self.header.has_ids else None

        sizes_of_files = sizes_in(stream)
        self._places: list[Place] = []
        sizes: list[int] = []
        for part in parts_of(index):
            file, whole = part.name + BLOCKS, part.starts[-1]
            if (size := sizes_of_files.get(file, "missing")) != whole:
                raise pa.ArrowInvalid(f"its file {file} is {size}, and should be {whole} bytes")
            for (start, end), digest in zip(pairwise(part.starts), part.digests, strict=True):
                self._places.append(Place(file, start, end - start, digest))
            sizes += part.sizes
        self.starts = np.array([0, *accumulate(sizes)])  # first sample of each block, and the end
        self._read = block_reader(stream, self.header, self._places)
        self._blocks = HeldBlocks(self._read, 2 * READERS)  # enough to read in order

    def __reduce__(self) -> tuple[type["Streamed"], tuple[Stream]]:
        return Streamed, (self.stream,)

    def columns(self, batches: list[int]) -> Iterable[pa.Array]:
        """Return the column ``x`` of some blocks."""
        return [block.column("x") for block in self._blocks(batches)]

    def as_split(self, gather: Gather | None = None) -> Split:
        """Return the split over these samples, read by blocks."""
        of = torch.from_numpy(np.repeat(np.arange(len(self._places)), np.diff(self.starts)))

        def copied(indices: np.ndarray) -> Take:
            return self.copied(indices).as_split(gather).take

        return replace(super().as_split(gather), blocks=Blocks(of, self.stream.window, copied, self.hold))

    def hold(self, count: int) -> None:
        """Hold at least ``count`` blocks, or all, in memory from now on; refuse more than this machine can hold."""
        count = min(count, len(self._places))
        largest = max(place.size for place in self._places)
        check_memory(f"dataset.window = {self.stream.window}, {count} blocks at once", count * largest, "lower it")
        self._blocks.hold(count)

    def copied(self, indices: np.ndarray) -> Store:
        """Copy samples, int64 [m] ascending, into a store of this machine that disappears with its last user."""
        cache = self.stream.cache
        bounds = np.searchsorted(indices, self.starts)  # first sample of each block among the indices, and the end
        counts = np.diff(bounds)
        shares = counts / np.diff(self.starts)  # of each block
        size = int(np.array([place.size for place in self._places]) @ shares)  # bytes, approximately

        def rows() -> Iterator[pa.RecordBatch]:
            blocks = np.flatnonzero(counts)
            for block, batch in zip(blocks, fetched(self._read, blocks.tolist()), strict=True):
                here = indices[bounds[block] : bounds[block + 1]]
                yield batch.take(pa.array(here - self.starts[block]))

        try:
            cache.mkdir(parents=True, exist_ok=True)
            check_cache_room(cache, size, f"a copy of {len(indices):,} samples")
            # A file without a name disappears with the process, even if that is killed. Once it is mapped, the disk
            # space is freed with the last view of it.
            with TemporaryFile(dir=cache) as file:
                path = Path(f"/dev/fd/{file.fileno()}")
                write_batches(path, self.header, merged_batches(rows(), COPIED_BYTES), self)
                pa.default_memory_pool().release_unused()  # buffers of the copy
                return Store(path)
        except OSError as error:
            raise UserError(f"cannot copy {len(indices):,} samples to {str(cache)!r}: {error}") from None


def block_reader(stream: Stream, header: Header, places: list[Place]) -> Callable[[int], pa.RecordBatch]:
    """Return a function that fetches a block by its number; it raises UserError if that is unreadable or damaged."""
    system, folder = stream.folder()
    schema = header.schema
    opened = lru_cache(OPEN)(system.open_input_file)

    def read(block: int) -> pa.RecordBatch:
        place = places[block]
        try:
            message = opened(f"{folder}/{place.file}").read_at(place.size, place.start)
        except OSError as error:
            raise UserError(f"block {block} of {str(stream)!r} cannot be read: {error}") from None
        if digest_of(message) != place.digest:
            raise UserError(f"block {block} of {str(stream)!r} is damaged: delete that folder, and it is built again")
        return pa.ipc.read_record_batch(pa.py_buffer(message), schema)

    return read


class HeldBlocks:
    """The ``most`` blocks that were used last, each fetched once however many threads request it."""

    def __init__(self, load: Callable[[int], pa.RecordBatch], most: int):
        self._pool = ThreadPoolExecutor(READERS, "blocks")
        self._load = load
        self._lock = Lock()
        self._most = 0
        self.hold(most)

    def hold(self, most: int) -> None:
        """Hold at least ``most`` blocks from now on; those held so far are dropped if that is more than before."""
        if most > self._most:
            self._most = most
            pool, load = self._pool, self._load  # not self: the blocks are freed with their last user
            self._fetched = lru_cache(most)(lambda number: pool.submit(load, number))

    def __call__(self, numbers: Sequence[int]) -> list[pa.RecordBatch]:
        """Return some blocks, fetching missing ones concurrently; after an error, the next call fetches again."""
        with self._lock:
            fetched = self._fetched
            coming = [fetched(number) for number in numbers]
        try:
            return [block.result() for block in coming]
        except BaseException:
            fetched.cache_clear()
            raise

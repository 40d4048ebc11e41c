"""The files of a store that is read by blocks, in a folder of its own.

NUMBER-DIGEST.blocks    a part: record batches of the store, each an IPC message, one after another
index                   written last, makes the store valid: labels and ids, header, statistics, parts

A file appears complete, under a name that identifies its contents: any other writer of that name writes the same. So
processes that import the same source at the same time need no lock.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs

from raypkg.core.address import address_of, opened, parted
from raypkg.data.kinds import Moments

from .arrow import Block, Header, record_batches

BLOCKS = ".blocks"
INDEX = "index"
DIGEST = 16  # characters
DAMAGE = (ValueError, KeyError, TypeError, pa.ArrowException)  # raised when a damaged file is read
BLOCK_BYTES = 8 << 20  # the latency of a request to an object store equals the transfer of some megabytes
PART_BYTES = 1 << 30


class Stream(NamedTuple):
    """Location of stores that are read by blocks, or of one of them."""

    address: str  # folder or URI that contains all of them
    window: int  # number of blocks that training batches draw from at a time
    cache: Path  # folder of this machine, for copies of some samples
    name: str = ""  # of one store

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

    @property
    def file(self) -> str:
        """The name of the file."""
        return self.name + BLOCKS

    @property
    def bytes(self) -> int:
        """The size of the file."""
        return self.starts[-1]


# Import


def write_streamed(stream: Stream, header: Header, blocks: Iterable[Block]) -> None:
    """Write a store, one block in memory at a time."""
    system, folder = stream.folder()
    system.create_dir(folder)
    moments = Moments()
    parts: list[StoredPart] = []
    tables: list[pa.Table] = []
    ahead = iter(blocks)
    for first in ahead:
        part, columns = _write_part(stream, len(parts), header, chain([first], ahead), moments)
        parts.append(part)
        tables.append(columns)
    facts = {"mean": moments.mean, "std": moments.std, "parts": [part._asdict() for part in parts]}
    write_columns(stream, INDEX, pa.concat_tables(tables), facts)
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

    with appearing(stream, lambda: part().file) as sink:
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


def tidy(stream: Stream) -> None:
    """Delete files that do not belong to the store, or all files if it has no index.

    Files that another process is writing are deleted too: with an index, that process finds a complete store.
    """
    system, folder = stream.folder()
    with suppress(OSError):
        try:
            used = {INDEX, *(part.file for part in parts_of(read_columns(stream, INDEX)))}
        except (FileNotFoundError, *DAMAGE):
            used = set()
        for name in sizes_in(stream).keys() - used:
            with suppress(OSError):
                system.delete_file(f"{folder}/{name}")
        if not used and not sizes_in(stream):
            system.delete_dir(folder)


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


@contextmanager
def appearing(stream: Stream, name: Callable[[], str]) -> Iterator[pa.NativeFile]:
    """Open a file for writing that gets its name at the end of the block, and is deleted on an error.

    Object stores need this too: after an error pyarrow still creates an object of the bytes written so far.
    """
    system, folder = stream.folder()
    unfinished = f"{folder}/{uuid4().hex}.tmp"
    try:
        with system.open_output_stream(unfinished) as sink:
            yield sink
        system.move(unfinished, f"{folder}/{name()}")
    except BaseException:  # Ctrl-C as well
        with suppress(OSError):
            system.delete_file(unfinished)
        raise

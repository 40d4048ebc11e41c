"""Writing a store that is read by blocks: part by part, so that an import that was killed goes on where it was.

A part ends where a block of the source does, and its note has the state of the statistics. So its bytes follow from
the source alone, whoever writes it and however often the import was killed.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate, chain
from typing import TypeVar
from uuid import uuid4

import pyarrow as pa

from raypkg.core.errors import UserError
from raypkg.data.kinds import Moments

from .arrow import record_batches
from .parts import (
    INDEX,
    NOTE,
    Note,
    StoredPart,
    Stream,
    appearing,
    digest_of,
    is_whole,
    read_note,
    sizes_in,
    write_columns,
    write_note,
)
from .stored import Block, Header

BLOCK_BYTES = 8 << 20  # a request to an object store takes as long as to send some megabytes
PART_BYTES = 1 << 30  # at most so much, and a block of the source, is read again after a kill

From = Callable[[int], Iterable[Block]]  # samples from one on, in the same blocks wherever it is

log = logging.getLogger(__name__)
T = TypeVar("T")


def write_streamed(stream: Stream, header: Header, blocks: From) -> None:
    """Write a store, holding a block at a time; the parts that an earlier import has left are kept.

    Args:
        stream: the store.
        header: what the samples are.
        blocks: gives them from one on, which is the first of a block.

    Raises:
        OSError: nothing can be written there, or another process has meanwhile written all of it.
    """
    system, folder = stream.folder()
    system.create_dir(folder)
    was_there = INDEX in sizes_in(stream)  # a damaged one
    header = Header.of(header.schema)  # as it is read back, to be compared
    notes = _kept(stream, header)
    start = sum(len(note.columns) for note in notes)
    if notes:
        log.warning("going on with the import of %s at sample %d", stream, start)
    moments = Moments(notes[-1].moments if notes else None)
    ahead = iter(blocks(start))
    for first in ahead:
        if not was_there and INDEX in sizes_in(stream):
            raise FileExistsError("another process has written it")
        before = notes[-1].part.name if notes else ""
        part, columns = _write_part(stream, len(notes), header, _run(chain([first], ahead)), moments)
        notes.append(Note(part, before, header, columns, moments.state))
        write_note(stream, notes[-1])
    facts = {"mean": moments.mean, "std": moments.std, "parts": [note.part._asdict() for note in notes]}
    columns = pa.concat_tables([note.columns.replace_schema_metadata(header.schema.metadata) for note in notes])
    write_columns(stream, stream.index_file, columns, facts)
    pa.default_memory_pool().release_unused()  # the memory through which it all went


def begun(stream: Stream) -> Header | None:
    """Return what an import that did not come to its end has taken the samples for, if there was one.

    Of two headers it is the one with more channels: the other was written before colour was found.
    """
    headers = [note.header for note in _candidates(stream, 0, sizes_in(stream))]
    return max(headers, key=lambda header: header.shape[0], default=None)


@contextmanager
def published(stream: Stream) -> Iterator[Stream]:
    """Give a store to be written, which becomes the one of the stream's name at the end of the block.

    If an error ends the block, its parts stay for the next import.
    """
    system, folder = stream.folder()
    unfinished = stream._replace(index_file=f"{uuid4().hex}.tmp")
    try:
        yield unfinished
        system.move(f"{folder}/{unfinished.index_file}", f"{folder}/{INDEX}")
    except BaseException:  # Ctrl-C as well
        with suppress(OSError):
            system.delete_file(f"{folder}/{unfinished.index_file}")
        raise


def beginning_at(start: int, runs: Iterable[T], length: Callable[[T], int]) -> Iterator[T]:
    """Leave out the runs of samples before one.

    Args:
        start: the number of the sample, which must be the first of a run.
        runs: of samples.
        length: of a run.

    Raises:
        UserError: it is not the first of one, so the parts were written by another version.

    >>> list(beginning_at(3, ["abc", "de", "f"], len))
    ['de', 'f']
    """
    passed = 0
    for run in runs:
        if passed >= start:
            yield run
        passed += length(run)
        if passed - length(run) < start < passed:
            raise UserError("the import that was killed ended within a block, as by another version: delete its folder")


def _kept(stream: Stream, header: Header) -> list[Note]:
    """Return the notes of the parts that an import of that header can go on from, in their order."""
    sizes = sizes_in(stream)
    kept: list[Note] = []

    def follows(note: Note) -> bool:
        before = kept[-1].part.name if kept else ""
        whole = sizes.get(note.part.file) == note.part.bytes
        return whole and note.before == before and note.header == header

    while following := [note for note in _candidates(stream, len(kept), sizes) if follows(note)]:
        kept.append(following[0])
    return kept


def _candidates(stream: Stream, number: int, names: Iterable[str]) -> list[Note]:
    """Return the notes of a number; more than one if images turned out to have colour."""
    wanted = sorted(name for name in names if name.startswith(_numbered(number)) and name.endswith(NOTE))
    notes = [read_note(stream, name) for name in wanted]
    return [note for note in notes if note]


def _write_part(
    stream: Stream, number: int, header: Header, blocks: Iterable[Block], moments: Moments
) -> tuple[StoredPart, pa.Table]:
    """Write a part; return it with the other columns of its samples."""
    schema = header.schema
    digests: list[str] = []
    lengths: list[int] = []  # of the messages, bytes
    columns: list[pa.RecordBatch] = []

    def part() -> StoredPart:
        name = _numbered(number) + digest_of("".join(digests).encode())
        starts = tuple(accumulate(lengths, initial=0))
        sizes = tuple(map(len, columns))
        return StoredPart(name, starts, sizes, tuple(digests))

    def is_there() -> bool:
        return is_whole(stream, part())

    with appearing(stream, lambda: part().file, is_there) as sink:
        for batch in _bounded(record_batches(schema, blocks, moments, BLOCK_BYTES)):
            message = batch.serialize()
            sink.write(message)
            digests.append(digest_of(message))
            lengths.append(message.size)
            columns.append(batch.drop_columns(["x"]))
    return part(), pa.Table.from_batches(columns)


def _numbered(number: int) -> str:
    """Return how the names of a part's files begin."""
    return f"{number:05}-"


def _run(blocks: Iterable[Block]) -> Iterator[Block]:
    """Yield the blocks of a part."""
    size = 0
    for block in blocks:
        yield block
        size += block.bytes
        if size >= PART_BYTES:
            return


def _bounded(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Cut record batches that are larger than a block; a sample is never divided."""
    for batch in batches:
        parts = -(-batch.nbytes // BLOCK_BYTES)
        rows = max(1, len(batch) // max(1, parts))
        for start in range(0, len(batch), rows):
            yield batch.slice(start, rows)

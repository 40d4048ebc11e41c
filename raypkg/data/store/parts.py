"""The files of a store that is read by blocks, in a folder of its own.

NUMBER-DIGEST.blocks    a part: record batches of the columns of the store, each an IPC message, one behind the other
NUMBER-DIGEST.part      what an import that goes on needs to know of the part; of use until the store is whole
index                   written last, makes the store one: labels and ids, the header, the statistics, the parts

A file appears whole, under a name that says what is in it: whoever else writes a part of that name writes the same.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs

from raypkg.core.address import address_of, opened, parted

from .stored import Header

BLOCKS = ".blocks"
NOTE = ".part"
INDEX = "index"
DIGEST = 16  # characters
DAMAGE = (ValueError, KeyError, TypeError, pa.ArrowException)  # what reading a damaged file raises


class Stream(NamedTuple):
    """Where stores are read by blocks.

    Attributes:
        address: the folder or URI of all of them.
        window: blocks from which the batches of training draw at any time.
        cache: folder of this machine, for copies of some samples.
        name: of one store.
        index_file: the name of its index, which is another one until the store is whole.
    """

    address: str
    window: int
    cache: Path
    name: str = ""
    index_file: str = INDEX

    def __str__(self) -> str:
        return address_of(self.address, [self.name])

    def folder(self) -> tuple[fs.FileSystem, str]:
        """Return the folder of the store, as its file system and its path there."""
        base, below = parted(self.address)
        system, path = opened(base)
        return system, "/".join([path, *below, self.name])


class StoredPart(NamedTuple):
    """A run of blocks, in a file.

    Attributes:
        name: of the file, without its ending.
        starts: bytes at which the blocks begin, and the end.
        sizes: samples of each block.
        digests: of the bytes of each block.
    """

    name: str
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    digests: tuple[str, ...]

    @property
    def file(self) -> str:
        """The name of the file."""
        return self.name + BLOCKS

    @property
    def bytes(self) -> int:
        """The size of the file."""
        return self.starts[-1]

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "StoredPart":
        """Read a part back from JSON."""
        return cls(fields["name"], tuple(fields["starts"]), tuple(fields["sizes"]), tuple(fields["digests"]))


class Note(NamedTuple):
    """What an import that goes on needs to know of a part.

    Attributes:
        part: itself.
        before: the name of the part before; of the first, none.
        header: of the store.
        columns: labels and ids of its samples, and the header as metadata.
        moments: the state of the statistics after it.
    """

    part: StoredPart
    before: str
    header: Header
    columns: pa.Table
    moments: dict[str, Any]


def write_note(stream: Stream, note: Note) -> None:
    """Write what an import that goes on needs to know of a part."""
    facts = {"part": note.part._asdict(), "before": note.before, "moments": note.moments}
    write_columns(stream, note.part.name + NOTE, note.columns, facts)


def read_note(stream: Stream, name: str) -> Note | None:
    """Read the note of that name; one that is damaged or of another format is none.

    Raises:
        OSError: it is not there, or cannot be had.
    """
    try:
        columns = read_columns(stream, name)
        part, before, moments = (fact_of(columns, each) for each in ("part", "before", "moments"))
        return Note(StoredPart.of(part), before, Header.of(columns.schema), columns, moments)
    except DAMAGE:
        return None


def write_columns(stream: Stream, name: str, columns: pa.Table, facts: dict[str, Any]) -> None:
    """Write labels and ids to a file, beside the metadata that they have some facts as JSON."""
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
    """Read labels and ids of a file, with the facts in the metadata.

    Raises:
        FileNotFoundError: it is not there.
        pyarrow.ArrowInvalid: it is damaged.
    """
    system, folder = stream.folder()
    with system.open_input_file(f"{folder}/{name}") as file:
        content = memoryview(file.read())
    body = content[:-DIGEST]
    if digest_of(body).encode() != content[-DIGEST:]:
        raise pa.ArrowInvalid(f"its file {name} is damaged")
    return pa.ipc.open_file(pa.py_buffer(body)).read_all()


def digest_of(content: Any) -> str:
    """Return a digest of some bytes, by which damage is known."""
    return blake2b(content, digest_size=DIGEST // 2).hexdigest()


def fact_of(columns: pa.Table, name: str) -> Any:
    """Return a fact that was written with some columns.

    Raises:
        KeyError: they have none of that name.
    """
    return json.loads(columns.schema.metadata[name.encode()])


def named_parts(index: pa.Table) -> list[StoredPart]:
    """Return the parts that an index names."""
    return [StoredPart.of(fields) for fields in fact_of(index, "parts")]


def sizes_in(stream: Stream) -> dict[str, int]:
    """Return the bytes of each file in the folder of a store: one request for every thousand."""
    system, folder = stream.folder()
    try:
        # Not with allow_not_found: a folder that is made at that moment is an error to it.
        entries = system.get_file_info(fs.FileSelector(folder))
    except FileNotFoundError:
        return {}
    return {entry.base_name: entry.size for entry in entries if entry.type == fs.FileType.File}


def is_whole(stream: Stream, part: StoredPart) -> bool:
    """Say whether a part is in its file, each byte as it was."""
    system, folder = stream.folder()
    try:
        with system.open_input_file(f"{folder}/{part.file}") as file:
            blocks = zip(pairwise(part.starts), part.digests, strict=True)
            return file.size() == part.bytes and all(
                digest_of(file.read_at(end - start, start)) == digest for (start, end), digest in blocks
            )
    except FileNotFoundError:
        return False


@contextmanager
def appearing(
    stream: Stream, name: Callable[[], str], is_there: Callable[[], bool] = lambda: False
) -> Iterator[pa.NativeFile]:
    """Open a file to write, which has its name at the end of the block, and is deleted if an error ends it.

    Until then it has a name that no other writer uses. On object stores too: pyarrow makes an object even of what was
    written before an error.

    Args:
        stream: the store.
        name: is asked when everything is written.
        is_there: likewise, whether the file is there already. It then stays: somebody may be reading it.
    """
    system, folder = stream.folder()
    unfinished = f"{folder}/{uuid4().hex}.tmp"
    try:
        with system.open_output_stream(unfinished) as sink:
            yield sink
        if is_there():
            system.delete_file(unfinished)
        else:
            system.move(unfinished, f"{folder}/{name()}")
    except BaseException:  # Ctrl-C as well
        with suppress(OSError):
            system.delete_file(unfinished)
        raise


def tidy(stream: Stream) -> None:
    """Delete what lies in the folder of a store and is not part of it, as far as that can be done.

    Without an index nothing is part of it. What another process is writing is deleted too: if there is an index, that
    process finds a store.
    """
    with suppress(OSError):
        used = _used(stream)
        for name in sizes_in(stream).keys() - used:
            _delete(stream, name)
        if not used and not sizes_in(stream):
            system, folder = stream.folder()
            system.delete_dir(folder)


def _used(stream: Stream) -> set[str]:
    """Return the names of the files that make the store."""
    try:
        index = read_columns(stream, INDEX)
        return {INDEX, *(part.file for part in named_parts(index))}
    except (FileNotFoundError, *DAMAGE):
        return set()


def _delete(stream: Stream, name: str) -> None:
    system, folder = stream.folder()
    with suppress(OSError):
        system.delete_file(f"{folder}/{name}")

"""A store that is read by blocks from where it lies, such as a bucket: no machine ever holds more than a window of it.

NAME.blocks     record batches of the columns of a store, one behind the other, each an IPC message of its own
NAME.index      written last: labels and ids, the header, the statistics, and where each block begins
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pyarrow import fs

from raypkg.core.address import address_of, opened, parted
from raypkg.core.errors import UserError
from raypkg.data.blocks import Blocks
from raypkg.data.moments import Moments
from raypkg.data.split import Split

from .arrow import Store, record_batches, write_batches
from .fetching import READERS, fetched
from .stored import Block, Decoder, Header, Stored, in_json, statistics_in
from .window import Window

BLOCK_BYTES = 8 << 20  # a request to an object store takes as long as to send some megabytes
SPARE = 16  # blocks beyond the window, for batches that are loaded ahead


class Stream(NamedTuple):
    """Where stores are read by blocks.

    Attributes:
        address: the folder or URI of all of them.
        window: blocks from which the batches of training draw at any time.
        cache: folder of this machine, for copies of a part.
        name: of one store.
    """

    address: str
    window: int
    cache: Path
    name: str = ""

    def __str__(self) -> str:
        return address_of(self.address, [self.name])

    def file(self, ending: str) -> tuple[fs.FileSystem, str]:
        """Return one of the store's two files, as its file system and its path there."""
        base, below = parted(self.address)
        system, path = opened(base)
        return system, "/".join([path, *below, self.name + ending])


def write_streamed(stream: Stream, header: Header, blocks: Iterable[Block]) -> None:
    """Write a store in one pass over its samples, holding a block at a time.

    Raises:
        OSError: nothing can be written there.
    """
    moments = Moments()
    schema = header.schema
    batches = _bounded(record_batches(schema, blocks, moments, BLOCK_BYTES))
    system, path = stream.file(".blocks")
    system.create_dir(path.rpartition("/")[0])
    starts = [0]  # bytes
    columns = []
    with system.open_output_stream(path) as sink:
        for batch in batches:
            message = batch.serialize()
            sink.write(message)
            starts.append(starts[-1] + message.size)
            columns.append(batch.drop_columns(["x"]))
    index = pa.Table.from_batches(columns)
    places = {"starts": json.dumps(starts), "sizes": json.dumps([len(batch) for batch in columns])}
    noted = {**(schema.metadata or {}), **in_json(moments), **places}
    _write_index(stream, index.replace_schema_metadata(noted).combine_chunks())


def _bounded(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Cut record batches that are larger than a block; a sample is never divided."""
    for batch in batches:
        parts = -(-batch.nbytes // BLOCK_BYTES)
        rows = max(1, len(batch) // max(1, parts))
        for start in range(0, len(batch), rows):
            yield batch.slice(start, rows)


def _write_index(stream: Stream, index: pa.Table) -> None:
    """Write a store's index, which appears whole or not at all, and makes the store one."""
    system, path = stream.file(".index")
    unfinished = f"{path}.tmp"
    with system.open_output_stream(unfinished) as sink, pa.ipc.new_file(sink, index.schema) as writer:
        writer.write_table(index)
    system.move(unfinished, path)


class Streamed(Stored):
    """An open store that is read by blocks. It pickles as its address.

    Raises:
        FileNotFoundError: there is no such store.
        pyarrow.ArrowInvalid: its index is damaged or of another format, or its blocks are not those that it names.
    """

    def __init__(self, stream: Stream):
        self.stream = stream
        self.name = str(stream)
        system, path = stream.file(".index")
        with system.open_input_file(path) as file:
            index = pa.ipc.open_file(pa.py_buffer(file.read())).read_all()
        noted = index.schema.metadata
        self.header = Header.of(index.schema)
        self.mean, self.std = statistics_in({key.decode(): value for key, value in noted.items()})
        self.y = _integers(index, "y")
        self.ids = _integers(index, "id") if self.header.has_ids else None
        self._bytes = json.loads(noted[b"starts"])  # where each block begins in the file, and the end
        sizes = json.loads(noted[b"sizes"])
        self._starts = np.array([0, *accumulate(sizes)])  # the first sample of each block, and the end
        self._file = _opened(stream, self._bytes[-1])
        self._window = Window(self._read, stream.window + SPARE)

    def __reduce__(self) -> tuple[type["Streamed"], tuple[Stream]]:
        return Streamed, (self.stream,)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Gather pixels [b, H, W, C] or rows [b, D]."""
        out: np.ndarray = np.empty((len(indices), *self.sample_shape), self.dtype)
        for here, local, column in self._columns(indices):
            out[here] = self.view(column)[local]
        return out

    def encoded(self, indices: np.ndarray) -> list[pa.Buffer]:
        """Return the bytes of encoded samples; each holds its block in memory."""
        out: list[Any] = [None] * len(indices)
        for here, local, column in self._columns(indices):
            for place, row in zip(here.tolist(), local.tolist(), strict=True):
                out[place] = column[row].as_buffer()
        return out

    def as_split(self, decoder: Decoder | None = None) -> Split:
        """Return the split over these samples, read by blocks."""
        split = super().as_split(decoder)
        of = np.repeat(np.arange(len(self._starts) - 1), np.diff(self._starts))

        def copied(indices: np.ndarray) -> Any:
            return self.copied(indices).as_split(decoder).take

        return replace(split, blocks=Blocks(torch.from_numpy(of), self.stream.window, copied))

    def copied(self, indices: np.ndarray) -> Store:
        """Copy samples, int64 [m] ascending, into a store of this machine, which is gone when nobody uses it.

        Raises:
            UserError: its disk is too small, or a block cannot be read.
        """
        self.stream.cache.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=self.stream.cache, prefix="part-", suffix=".tmp") as file:
            path = Path(file.name)
            try:
                write_batches(path, self.header, self._parts(indices), self)
            except OSError as error:
                raise UserError(f"cannot copy {len(indices):,} samples to {str(path.parent)!r}: {error}") from None
            return Store(path)  # mapped: the disk is given back when the last view of it is gone

    def _parts(self, indices: np.ndarray) -> Iterator[pa.RecordBatch]:
        """Read every block that has some of the samples, once, and yield these."""
        blocks, places = self._places(indices)
        batches = fetched(self._read, blocks.tolist())
        for block, batch in zip(blocks, batches, strict=True):
            here = places == block
            local = indices[here] - self._starts[block]
            yield batch.take(pa.array(local))

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the blocks that have the samples, ascending, and the block of each sample."""
        block = np.searchsorted(self._starts, indices, side="right") - 1
        return np.unique(block), block

    def _columns(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, pa.Array]]:
        """Yield, of each block that has some of the samples: which of them, their rows in it, and its column."""
        blocks, places = self._places(indices)
        for start in range(0, len(blocks), READERS):  # so many at once, however many there are
            some = blocks[start : start + READERS]
            for block, batch in zip(some, self._window(some.tolist()), strict=True):
                here = np.flatnonzero(places == block)
                yield here, indices[here] - self._starts[block], batch.column("x")

    def _read(self, block: int) -> pa.RecordBatch:
        """Fetch a block.

        Raises:
            UserError: it cannot be had, or is damaged.
        """
        start, end = self._bytes[block : block + 2]
        try:
            message = self._file.read_at(end - start, start)
            return pa.ipc.read_record_batch(pa.py_buffer(message), self.header.schema)
        except (OSError, EOFError, pa.ArrowException) as error:
            raise UserError(f"block {block} of {self.name!r} cannot be read: {error}") from None


def _opened(stream: Stream, size: int) -> pa.NativeFile:
    """Open the blocks of a store, which are so many bytes."""
    system, path = stream.file(".blocks")
    found = system.get_file_info(path)
    if found.size != size:
        raise pa.ArrowInvalid(f"its blocks are {found.size} bytes, and should be {size}")
    return system.open_input_file(path)


def _integers(index: pa.Table, name: str) -> torch.Tensor:
    return torch.from_numpy(index[name].to_numpy().copy())

"""A store that is read by blocks from where it lies, such as a bucket: no machine holds more than a window of it."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raypkg.core.errors import UserError
from raypkg.data.blocks import Blocks
from raypkg.data.split import Split

from .arrow import Store, write_batches
from .fetching import READERS, fetched
from .parts import StoredPart, Stream, named_parts, read_columns, sizes_in
from .stored import Decoder, Header, Stored, statistics_in
from .window import Window

SPARE = 16  # blocks beyond the window, for batches that are loaded ahead
OPEN = 256  # files that a process keeps open


class Streamed(Stored):
    """An open store that is read by blocks. It pickles as its address.

    Raises:
        FileNotFoundError: there is no such store.
        pyarrow.ArrowInvalid: its index is damaged or of another format, or its blocks are not those that it names.
    """

    def __init__(self, stream: Stream):
        self.stream = stream
        self.name = str(stream)
        index = read_columns(stream, stream.index_file)
        self.header = Header.of(index.schema)
        self.mean, self.std = statistics_in({key.decode(): value for key, value in index.schema.metadata.items()})
        self.y = _integers(index, "y")
        self.ids = _integers(index, "id") if self.header.has_ids else None
        parts = named_parts(index)
        _check_whole(stream, parts)
        self._places = [place for part in parts for place in _places_in(part)]  # of each block
        sizes = [size for part in parts for size in part.sizes]
        self._starts = np.array([0, *accumulate(sizes)])  # the first sample of each block, and the end
        self._open = lru_cache(OPEN)(partial(_open, stream))
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
        blocks, places = self._blocks_of(indices)
        batches = fetched(self._read, blocks.tolist())
        for block, batch in zip(blocks, batches, strict=True):
            here = places == block
            local = indices[here] - self._starts[block]
            yield batch.take(pa.array(local))

    def _blocks_of(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the blocks that have the samples, ascending, and the block of each sample."""
        block = np.searchsorted(self._starts, indices, side="right") - 1
        return np.unique(block), block

    def _columns(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, pa.Array]]:
        """Yield, of each block that has some of the samples: which of them, their rows in it, and its column."""
        blocks, places = self._blocks_of(indices)
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
        file, start, size = self._places[block]
        try:
            message = self._open(file).read_at(size, start)
            return pa.ipc.read_record_batch(pa.py_buffer(message), self.header.schema)
        except (OSError, EOFError, pa.ArrowException) as error:
            raise UserError(f"block {block} of {self.name!r} cannot be read: {error}") from None


def _check_whole(stream: Stream, parts: list[StoredPart]) -> None:
    """Refuse a store whose parts are not those that its index names."""
    sizes = sizes_in(stream)
    for part in parts:
        if part.file not in sizes:
            raise pa.ArrowInvalid(f"its file {part.file} is missing")
        if sizes[part.file] != part.bytes:
            raise pa.ArrowInvalid(f"its file {part.file} is {sizes[part.file]} bytes, and should be {part.bytes}")


def _places_in(part: StoredPart) -> Iterator[tuple[str, int, int]]:
    """Yield the file, the first byte and the bytes of each block of a part."""
    for start, end in pairwise(part.starts):
        yield part.file, start, end - start


def _open(stream: Stream, file: str) -> pa.NativeFile:
    system, folder = stream.folder()
    return system.open_input_file(f"{folder}/{file}")


def _integers(index: pa.Table, name: str) -> torch.Tensor:
    return torch.from_numpy(index[name].to_numpy().copy())

"""A store that is read by blocks from where it lies, such as a bucket: no machine holds more than a window of it."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from raypkg.core.errors import UserError
from raypkg.data.memory import check_cache_room, check_memory
from raypkg.data.split import Blocks, Split, Take

from .arrow import Store, merged_batches, write_batches
from .fetching import READERS, fetched
from .held import HeldBlocks
from .parts import StoredPart, Stream, digest_of, named_parts, read_columns, sizes_in
from .stored import Decoder, Header, Stored, statistics_in

COPIED_BYTES = 64 << 20  # of a copy's record batches
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
        sizes = [size for part in parts for size in part.sizes]
        self._starts = np.array([0, *accumulate(sizes)])  # the first sample of each block, and the end
        self._read = BlockReader(stream, self.header, parts)
        self._blocks = HeldBlocks(self._read, 2 * READERS)  # enough to read in order

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

        def copied(indices: np.ndarray) -> Take:
            return self.copied(indices).as_split(decoder).take

        return replace(split, blocks=Blocks(torch.from_numpy(of), self.stream.window, copied, self.hold))

    def hold(self, count: int) -> None:
        """Hold at least so many blocks in memory from now on, or all.

        Raises:
            UserError: this machine's memory is too small for them.
        """
        count = min(count, len(self._read.places))
        largest = max(place.size for place in self._read.places)
        check_memory(f"dataset.window = {self.stream.window}, {count} blocks at once", count * largest, "lower it")
        self._blocks.hold(count)

    def copied(self, indices: np.ndarray) -> Store:
        """Copy samples, int64 [m] ascending, into a store of this machine, which is gone when nobody uses it.

        Raises:
            UserError: its disk is too small, or a block cannot be read.
        """
        cache = self.stream.cache
        bounds = np.searchsorted(indices, self._starts)  # where the samples of each block begin, and the end
        try:
            cache.mkdir(parents=True, exist_ok=True)
            check_cache_room(cache, self._size(bounds), f"a copy of {len(indices):,} samples")
            with TemporaryFile(dir=cache) as file:  # without a name: it goes with the process, even if that is killed
                path = Path(f"/dev/fd/{file.fileno()}")
                batches = merged_batches(self._rows(indices, bounds), COPIED_BYTES)
                write_batches(path, self.header, batches, self)
                pa.default_memory_pool().release_unused()  # the memory through which it all went
                return Store(path)  # mapped: the disk is given back when the last view of it is gone
        except OSError as error:
            raise UserError(f"cannot copy {len(indices):,} samples to {str(cache)!r}: {error}") from None

    def _size(self, bounds: np.ndarray) -> int:
        """Return about how many bytes some samples take, from how many of each block they are."""
        sizes = np.array([place.size for place in self._read.places])
        shares = np.diff(bounds) / np.diff(self._starts)
        return int(sizes @ shares)

    def _rows(self, indices: np.ndarray, bounds: np.ndarray) -> Iterator[pa.RecordBatch]:
        """Read every block that has some of the samples, once, and yield these."""
        blocks = np.flatnonzero(np.diff(bounds))
        for block, batch in zip(blocks, fetched(self._read, blocks.tolist()), strict=True):
            here = indices[bounds[block] : bounds[block + 1]]
            yield batch.take(pa.array(here - self._starts[block]))

    def _columns(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, pa.Array]]:
        """Yield, of each block that has some of the samples: which of them, their rows in it, and its column."""
        owner = np.searchsorted(self._starts, indices, side="right") - 1  # [b], the block of each sample
        blocks = np.unique(owner)
        for start in range(0, len(blocks), READERS):  # so many at once, however many there are
            some = blocks[start : start + READERS]
            for block, batch in zip(some, self._blocks(some.tolist()), strict=True):
                here = np.flatnonzero(owner == block)
                yield here, indices[here] - self._starts[block], batch.column("x")


class BlockReader:
    """Reads the blocks of a store, by their number.

    Attributes:
        places: of each block.
    """

    def __init__(self, stream: Stream, header: Header, parts: list[StoredPart]):
        self.places = [place for part in parts for place in _places_in(part)]
        self._name = str(stream)
        self._schema = header.schema
        self._open = lru_cache(OPEN)(partial(_open, stream))

    def __call__(self, block: int) -> pa.RecordBatch:
        """Fetch a block.

        Raises:
            UserError: it cannot be had, or is damaged.
        """
        place = self.places[block]
        try:
            message = self._open(place.file).read_at(place.size, place.start)
        except OSError as error:
            raise UserError(f"block {block} of {self._name!r} cannot be read: {error}") from None
        if digest_of(message) != place.digest:
            raise UserError(f"block {block} of {self._name!r} is damaged: delete that folder, and it is built again")
        return pa.ipc.read_record_batch(pa.py_buffer(message), self._schema)


class BlockPlace(NamedTuple):
    """Where a block lies: a file of the store, the first byte in it and the number of bytes; and their digest."""

    file: str
    start: int
    size: int
    digest: str


def _check_whole(stream: Stream, parts: list[StoredPart]) -> None:
    """Refuse a store whose parts are not those that its index names."""
    sizes = sizes_in(stream)
    for part in parts:
        if part.file not in sizes:
            raise pa.ArrowInvalid(f"its file {part.file} is missing")
        if sizes[part.file] != part.bytes:
            raise pa.ArrowInvalid(f"its file {part.file} is {sizes[part.file]} bytes, and should be {part.bytes}")


def _places_in(part: StoredPart) -> Iterator[BlockPlace]:
    """Yield where each block of a part lies."""
    for (start, end), digest in zip(pairwise(part.starts), part.digests, strict=True):
        yield BlockPlace(part.file, start, end - start, digest)


def _open(stream: Stream, file: str) -> pa.NativeFile:
    system, folder = stream.folder()
    return system.open_input_file(f"{folder}/{file}")


def _integers(index: pa.Table, name: str) -> torch.Tensor:
    return torch.from_numpy(index[name].to_numpy().copy())

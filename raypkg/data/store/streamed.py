"""A store that is read by blocks, such as from a bucket: no machine holds more than a window of it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from raypkg.core.errors import UserError
from raypkg.core.memory import check_cache_room, check_memory
from raypkg.data.files import READERS, fetched
from raypkg.data.split import Blocks, Split, Take

from .arrow import Gather, Header, Store, Stored, merged_batches, write_batches
from .parts import Stream, digest_of, fact_of, parts_of, read_columns, sizes_in

COPIED_BYTES = 64 << 20  # of a copy's record batches
OPEN = 256  # files kept open per process


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
            if (size := sizes_of_files.get(part.file)) is None:
                raise pa.ArrowInvalid(f"its file {part.file} is missing")
            if size != part.bytes:
                raise pa.ArrowInvalid(f"its file {part.file} is {size} bytes, and should be {part.bytes}")
            for (start, end), digest in zip(pairwise(part.starts), part.digests, strict=True):
                self._places.append(Place(part.file, start, end - start, digest))
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
        split = super().as_split(gather)
        of = np.repeat(np.arange(len(self._places)), np.diff(self.starts))

        def copied(indices: np.ndarray) -> Take:
            return self.copied(indices).as_split(gather).take

        return replace(split, blocks=Blocks(torch.from_numpy(of), self.stream.window, copied, self.hold))

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

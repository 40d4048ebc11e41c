"""The store: samples in a memory-mapped Arrow IPC file, shared by every process of a machine.

Column ``x`` holds pixels (fixed-size binary, H·W·C bytes), encoded images (large binary) or float32 rows (fixed-size
list); column ``y`` the labels; column ``id``, where the header says so, the ids. Record batches are bounded, so a set
may be larger than memory on its way in and out. The statistics are known only at the end: they travel as the metadata
of an empty last record batch.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from raypkg.data.kinds import Moments

from .stored import Block, Header, Statistics, Stored, in_json, statistics_in

BATCH_BYTES = 256 << 20


def write(path: Path, header: Header, blocks: Iterable[Block]) -> None:
    """Stream blocks into a store file, one record batch of at most ``BATCH_BYTES`` at a time."""
    moments = Moments()
    batches = record_batches(header.schema, blocks, moments, BATCH_BYTES)
    write_batches(path, header, batches, moments)


def write_batches(path: Path, header: Header, batches: Iterable[pa.RecordBatch], statistics: Statistics) -> None:
    """Stream record batches into a store file; the statistics are asked for when all are written."""
    schema = header.schema
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
        # The file's own metadata had to be written first, but each batch has some: the last batch is empty but for it.
        last = pa.RecordBatch.from_pylist([], schema)
        writer.write_batch(last, custom_metadata=in_json(statistics))


def record_batches(schema: pa.Schema, blocks: Iterable[Block], moments: Moments, most: int) -> Iterator[pa.RecordBatch]:
    """Return blocks as record batches of at most so many bytes, if no block has more, and update the moments."""
    kind = schema.field("x").type

    def batch_of(block: Block) -> pa.RecordBatch:
        moments.update(block.sample)
        x = _column(block.x, kind)
        y = pa.array(block.y, pa.int64())
        ids = [] if block.ids is None else [pa.array(block.ids, pa.int64())]
        return pa.record_batch([x, y, *ids], schema)

    return merged_batches(map(batch_of, blocks), most)


def merged_batches(batches: Iterable[pa.RecordBatch], most: int) -> Iterator[pa.RecordBatch]:
    """Join record batches, one or more, to such of at most so many bytes, if none has more."""
    pending: list[pa.RecordBatch] = []
    size = 0  # bytes of the pending batches
    for batch in batches:
        if pending and size + batch.nbytes > most:
            yield pa.concat_batches(pending)
            pending = []
            size = 0
        pending.append(batch)
        size += batch.nbytes
    yield pa.concat_batches(pending)


def _column(x: np.ndarray | list[bytes], kind: pa.DataType) -> pa.Array:
    if isinstance(x, list):
        return pa.array(x, kind)
    if pa.types.is_fixed_size_list(kind):
        values = pa.array(x.reshape(-1))
        return pa.FixedSizeListArray.from_arrays(values, type=kind)
    pixels = pa.py_buffer(np.ascontiguousarray(x))
    valid = None  # no bitmap: no value is missing
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(x), [valid, pixels])


class Store(Stored):
    """An open store: its columns are views of the mapped file. It pickles as its path.

    Raises:
        FileNotFoundError: there is no such file.
        pyarrow.ArrowInvalid: the file is truncated or no store of this format.
    """

    def __init__(self, path: Path):
        self.path = path
        self.name = str(path)
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            self.header = Header.of(reader.schema)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches - 1)]
            last = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
        statistics = last.custom_metadata
        if statistics is None:
            raise pa.ArrowInvalid("its statistics are missing")
        self.mean, self.std = statistics_in(statistics)
        self._columns = [batch.column("x") for batch in batches]
        self._starts = [0, *accumulate(map(len, self._columns))]  # where each record batch begins, and the end
        self._views = []  # the mapped file as one array per record batch
        if self.header.kind != "encoded":
            self._views = [self.view(column) for column in self._columns]
        self.y = _gathered(batches, "y")  # [n]
        self.ids = _gathered(batches, "id") if self.header.has_ids else None  # [n]

    def __reduce__(self) -> tuple[type["Store"], tuple[Path]]:
        return Store, (self.path,)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Gather pixels [b, H, W, C] or rows [b, D], with one fancy index for each record batch that is touched."""
        first = self._views[0]
        if len(self._views) == 1:
            return first.take(indices, axis=0)
        out = np.empty((len(indices), *first.shape[1:]), first.dtype)
        owner = np.searchsorted(self._starts, indices, side="right") - 1  # [b], the record batch of each sample
        for batch in np.unique(owner):
            here = owner == batch
            local = indices[here] - self._starts[batch]
            out[here] = self._views[batch][local]
        return out

    def encoded(self, indices: np.ndarray) -> list[pa.Buffer]:
        """Return the bytes of encoded samples, without a copy."""
        return [self._encoded(index) for index in indices.tolist()]

    def _encoded(self, index: int) -> pa.Buffer:
        batch = bisect_right(self._starts, index) - 1
        local = index - self._starts[batch]
        return self._columns[batch][local].as_buffer()


def _gathered(batches: Iterable[pa.RecordBatch], name: str) -> torch.Tensor:
    """Return a column of integers over all record batches."""
    parts = [batch.column(name).to_numpy() for batch in batches]
    return torch.from_numpy(np.concatenate(parts))

"""The store: samples in a memory-mapped Arrow IPC file, shared by every process of a machine.

Column ``x`` holds pixels (fixed-size binary, H·W·C bytes), encoded images (large binary) or float32 rows (fixed-size
list); column ``y`` the labels; column ``id``, where the header says so, the ids. Record batches are bounded, so a set
may be larger than memory on its way in and out. The statistics are known only at the end: they travel as the metadata
of an empty last record batch.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from raypkg.data.moments import Moments
from raypkg.data.split import Split, Take

FORMAT = 1
BATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class Header:
    """What is known before the first sample is written."""

    kind: Literal["pixels", "encoded", "rows"]
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    augment: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    has_ids: bool = False

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the columns, with this header as its metadata."""
        fields = {"format": FORMAT, **asdict(self)}
        columns = {"x": self._type, "y": pa.int64()}
        if self.has_ids:
            columns["id"] = pa.int64()
        return pa.schema(
            columns,
            metadata={"effray": json.dumps(fields)},
        )

    @property
    def _type(self) -> pa.DataType:
        size = math.prod(self.shape)
        if self.kind == "pixels":
            return pa.binary(size)
        if self.kind == "rows":
            return pa.list_(pa.float32(), size)
        return pa.large_binary()

    @classmethod
    def of(cls, schema: pa.Schema) -> "Header":
        """Read the header back from a schema."""
        metadata = schema.metadata or {}
        fields = json.loads(metadata.get(b"effray", b"{}"))
        if fields.get("format") != FORMAT:
            raise pa.ArrowInvalid(f"not a store of format {FORMAT}")
        return cls(
            kind=fields["kind"],
            shape=tuple(fields["shape"]),
            classes=tuple(fields["classes"]),
            augment=tuple(fields.get("augment", ())),
            columns=tuple(fields.get("columns", ())),
            has_ids=fields.get("has_ids", False),
        )


class Block(NamedTuple):
    """A few samples on their way into a store."""

    x: np.ndarray | list[bytes]  # uint8 [m, H, W, C], float32 [m, D], or encoded images
    y: np.ndarray  # int64 [m]
    sample: np.ndarray  # what the statistics are taken from: x itself, or some of the images, decoded
    ids: np.ndarray | None = None  # int64 [m], where the header says that there are any


def write(path: Path, header: Header, blocks: Iterable[Block]) -> None:
    """Stream blocks into a store file, one record batch of at most ``BATCH_BYTES`` at a time."""
    moments = Moments()
    schema = header.schema
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in _record_batches(schema, blocks, moments):
            writer.write_batch(batch)
        # The file's own metadata had to be written first, but each batch has some: the last batch is empty but for it.
        last = pa.RecordBatch.from_pylist([], schema)
        statistics = {"mean": json.dumps(moments.mean), "std": json.dumps(moments.std)}
        writer.write_batch(last, custom_metadata=statistics)


def _record_batches(schema: pa.Schema, blocks: Iterable[Block], moments: Moments) -> Iterator[pa.RecordBatch]:
    """Join blocks to record batches as large as allowed, and update the moments on the way."""
    kind = schema.field("x").type
    pending: list[pa.RecordBatch] = []
    size = 0  # bytes of the pending batches
    for block in blocks:
        moments.update(block.sample)
        x = _column(block.x, kind)
        y = pa.array(block.y, pa.int64())
        ids = [] if block.ids is None else [pa.array(block.ids, pa.int64())]
        batch = pa.record_batch([x, y, *ids], schema)
        if pending and size + batch.nbytes > BATCH_BYTES:
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


class Store:
    """An open store: its columns are views of the mapped file. It pickles as its path.

    Raises:
        FileNotFoundError: there is no such file.
        pyarrow.ArrowInvalid: the file is truncated or no store of this format.
    """

    def __init__(self, path: Path):
        self.path = path
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            self.header = Header.of(reader.schema)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches - 1)]
            last = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
        statistics = last.custom_metadata
        if statistics is None:
            raise pa.ArrowInvalid("its statistics are missing")
        self._mean = tuple(json.loads(statistics["mean"]))
        self._std = tuple(json.loads(statistics["std"]))
        self._columns = [batch.column("x") for batch in batches]
        self._starts = [0, *accumulate(map(len, self._columns))]  # where each record batch begins, and the end
        self._views = []  # the mapped file as one array per record batch
        if self.header.kind != "encoded":
            self._views = [self._view(column) for column in self._columns]
        self.y = _gathered(batches, "y")  # [n]
        self.ids = _gathered(batches, "id") if self.header.has_ids else None  # [n]

    def __reduce__(self) -> tuple[type["Store"], tuple[Path]]:
        return Store, (self.path,)

    def __len__(self) -> int:
        return self._starts[-1]

    def _view(self, column: pa.Array) -> np.ndarray:
        """Return a column as an array over the mapped file itself, without a copy."""
        values = column.buffers()[-1]  # the others hold which values are missing
        if self.header.kind == "rows":
            return _over(values, np.float32, (len(column), *self.header.shape))
        channels, height, width = self.header.shape
        # Stored as [H, W, C]: a batch of them is then an image tensor in channels_last memory.
        return _over(values, np.uint8, (len(column), height, width, channels))

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

    def encoded(self, index: int) -> pa.Buffer:
        """Return the bytes of one encoded image, without a copy."""
        batch = bisect_right(self._starts, index) - 1
        local = index - self._starts[batch]
        return self._columns[batch][local].as_buffer()

    def as_split(self, take: Take | None = None) -> Split:
        """Return the split over this store; ``take`` replaces the plain gather where images must be decoded."""
        return Split(
            take=take or self.take,
            y=self.y,
            classes=self.header.classes,
            shape=self.header.shape,
            mean=self._mean,
            std=self._std,
            augment=self.header.augment,
            columns=self.header.columns,
            ids=self.ids,
        )


def _gathered(batches: Iterable[pa.RecordBatch], name: str) -> torch.Tensor:
    """Return a column of integers over all record batches."""
    parts = [batch.column(name).to_numpy() for batch in batches]
    return torch.from_numpy(np.concatenate(parts))


def _over(values: pa.Buffer, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    # The buffer may be longer than its values: Arrow pads it.
    flat: np.ndarray = np.frombuffer(values, dtype, count=int(np.prod(shape)))
    return flat.reshape(shape)

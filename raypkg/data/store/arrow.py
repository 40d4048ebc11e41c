"""The store: samples in a memory-mapped Arrow IPC file, shared by every process of a machine.

Column ``x`` holds pixels (fixed-size binary, H·W·C bytes), encoded images (large binary) or float32 rows (fixed-size
list); column ``y`` the labels. Record batches are bounded, so a set may be larger than memory on its way in and out.
The statistics are known only at the end: they travel as the metadata of an empty last record batch.
"""

import json
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

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the two columns, with this header as its metadata."""
        size = int(np.prod(self.shape))
        x = {"pixels": pa.binary(size), "encoded": pa.large_binary(), "rows": pa.list_(pa.float32(), size)}[self.kind]
        return pa.schema({"x": x, "y": pa.int64()}, {"effray": json.dumps({"format": FORMAT, **asdict(self)})})

    @classmethod
    def of(cls, schema: pa.Schema) -> "Header":
        """Read the header back from a schema."""
        fields = json.loads((schema.metadata or {}).get(b"effray", b"{}"))
        if fields.pop("format", None) != FORMAT:
            raise pa.ArrowInvalid(f"not a store of format {FORMAT}")
        return cls(
            fields["kind"], *(tuple(fields.get(name, ())) for name in ("shape", "classes", "augment", "columns"))
        )


class Block(NamedTuple):
    """A few samples on their way into a store."""

    x: np.ndarray | list[bytes]  # uint8 [m, H, W, C], float32 [m, D], or encoded images
    y: np.ndarray  # int64 [m]
    sample: np.ndarray  # what the statistics are taken from: x itself, or some of the images, decoded


def write(path: Path, header: Header, blocks: Iterable[Block]) -> None:
    """Stream blocks into a store file, one record batch of at most ``BATCH_BYTES`` at a time."""
    moments = Moments()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, header.schema) as writer:
        for batch in _record_batches(header.schema, blocks, moments):
            writer.write_batch(batch)
        statistics = {"mean": json.dumps(moments.mean), "std": json.dumps(moments.std)}
        writer.write_batch(pa.RecordBatch.from_pylist([], header.schema), custom_metadata=statistics)


def _record_batches(schema: pa.Schema, blocks: Iterable[Block], moments: Moments) -> Iterator[pa.RecordBatch]:
    pending: list[pa.RecordBatch] = []
    for block in blocks:
        moments.update(block.sample)
        batch = pa.record_batch([_column(block.x, schema.field("x").type), pa.array(block.y, pa.int64())], schema)
        if pending and sum(b.nbytes for b in pending) + batch.nbytes > BATCH_BYTES:
            yield pa.concat_batches(pending)
            pending = []
        pending.append(batch)
    yield pa.concat_batches(pending)


def _column(x: np.ndarray | list[bytes], kind: pa.DataType) -> pa.Array:
    if isinstance(x, list):
        return pa.array(x, kind)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), type=kind)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(x), [None, pa.py_buffer(np.ascontiguousarray(x))])


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
            *batches, (_, moments) = map(reader.get_batch_with_custom_metadata, range(reader.num_record_batches))
        if moments is None:
            raise pa.ArrowInvalid("its statistics are missing")
        self._mean, self._std = (tuple(json.loads(moments[key])) for key in ("mean", "std"))
        self._columns = [batch.column("x") for batch, _ in batches]
        self._starts = [0, *accumulate(map(len, self._columns))]
        self._views = [] if self.header.kind == "encoded" else [self._view(column) for column in self._columns]
        self.y = torch.from_numpy(np.concatenate([batch.column("y").to_numpy() for batch, _ in batches]))  # [n]

    def __reduce__(self) -> tuple[type["Store"], tuple[Path]]:
        return Store, (self.path,)

    def __len__(self) -> int:
        return self._starts[-1]

    def _view(self, column: pa.Array) -> np.ndarray:
        shape = self.header.shape
        stored = (*shape[1:], shape[0]) if self.header.kind == "pixels" else shape  # images lie as [H, W, C]
        dtype = np.uint8 if self.header.kind == "pixels" else np.float32
        flat = np.frombuffer(column.buffers()[-1], dtype, count=len(column) * int(np.prod(shape)))
        return flat.reshape(len(column), *stored)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Gather pixels [b, H, W, C] or rows [b, D], with one fancy index for each record batch that is touched."""
        if len(self._views) == 1:
            return self._views[0].take(indices, axis=0)
        out = np.empty((len(indices), *self._views[0].shape[1:]), self._views[0].dtype)
        batch_of = np.searchsorted(self._starts, indices, side="right") - 1
        for batch in np.unique(batch_of):
            here = batch_of == batch
            out[here] = self._views[batch][indices[here] - self._starts[batch]]
        return out

    def encoded(self, index: int) -> pa.Buffer:
        """Return the bytes of one encoded image, without a copy."""
        batch = bisect_right(self._starts, index) - 1
        return self._columns[batch][index - self._starts[batch]].as_buffer()

    def as_split(self, take: Take | None = None) -> Split:
        """Return the split over this store; ``take`` replaces the plain gather where images must be decoded."""
        header = self.header
        known = (header.classes, header.shape, self._mean, self._std, header.augment, header.columns)
        return Split(take or self.take, self.y, *known)

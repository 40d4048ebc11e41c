"""Stored samples, and the store that holds them in a memory-mapped Arrow IPC file shared by all processes of a machine.

Column ``x`` holds pixels (fixed-size binary, H·W·C bytes), encoded samples (large binary) or float32 rows (fixed-size
list); column ``y`` the labels; column ``id``, if the header says so, the ids. Record batches are bounded, so a set may
exceed memory on its way in and out. The statistics are known only at the end: they are the metadata of an empty last
record batch.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from raypkg.data.files import READERS
from raypkg.data.kinds import Moments
from raypkg.data.split import Split

FORMAT = 1
BATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class Header:
    """Properties of the samples that are known before the first is written."""

    kind: Literal["pixels", "encoded", "rows"]
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    augment: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    has_ids: bool = False
    tokenizer: str = ""  # as JSON, if it was trained on the texts

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the columns, with this header as its metadata."""
        size = math.prod(self.shape)
        match self.kind:
            case "pixels":
                x = pa.binary(size)
            case "rows":
                x = pa.list_(pa.float32(), size)
            case _:
                x = pa.large_binary()
        columns = {"x": x, "y": pa.int64()} | ({"id": pa.int64()} if self.has_ids else {})
        return pa.schema(columns, metadata={"effray": json.dumps({"format": FORMAT, **asdict(self)})})

    @property
    def stored(self) -> tuple[type, tuple[int, ...]]:
        """The type and shape of a row, float32 [D], or of pixels as they are stored, uint8 [H, W, C]."""
        if self.kind == "rows":
            return np.float32, self.shape
        channels, height, width = self.shape
        return np.uint8, (height, width, channels)

    @classmethod
    def of(cls, schema: pa.Schema) -> "Header":
        """Read the header back from a schema; raises ArrowInvalid if it is of another format."""
        metadata = schema.metadata or {}
        fields = json.loads(metadata.get(b"effray", b"{}"))
        if fields.pop("format", None) != FORMAT:
            raise pa.ArrowInvalid(f"not a store of format {FORMAT}")
        values: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in fields.items()}
        return cls(**values)


class Block(NamedTuple):
    """Some samples on their way into a store."""

    x: np.ndarray | list[bytes]  # uint8 [m, H, W, C], float32 [m, D], or encoded samples
    y: np.ndarray  # int64 [m]
    sample: np.ndarray  # contributes to the statistics: x itself, or some of the images, decoded
    ids: np.ndarray | None = None  # int64 [m], if the header has ids


class Stored(ABC):
    """Samples as they are stored, wherever that is."""

    name: str  # for error messages
    header: Header
    y: torch.Tensor  # labels, int64 [n]
    ids: torch.Tensor | None  # int64 [n]
    mean: tuple[float, ...]  # of each channel or column
    std: tuple[float, ...]
    starts: np.ndarray  # first sample of each record batch, and the end

    def __len__(self) -> int:
        return len(self.y)

    @abstractmethod
    def columns(self, batches: list[int]) -> Iterable[pa.Array]:
        """Return the column ``x`` of some record batches."""

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Gather pixels [b, H, W, C] or rows [b, D]."""
        dtype, shape = self.header.stored
        out: np.ndarray = np.empty((len(indices), *shape), dtype)
        for here, local, column in self._touched(indices):
            out[here] = self.view(column)[local]
        return out

    def encoded(self, indices: np.ndarray) -> list[pa.Buffer]:
        """Gather the bytes of encoded samples without a copy; each keeps its record batch in memory."""
        out: list[Any] = [None] * len(indices)
        for here, local, column in self._touched(indices):
            for place, row in zip(here.tolist(), local.tolist(), strict=True):
                out[place] = column[row].as_buffer()
        return out

    def _touched(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, pa.Array]]:
        """Yield, for each record batch with some of the samples: their places, their rows in it, its column."""
        owner = np.searchsorted(self.starts, indices, side="right") - 1  # [b], the record batch of each sample
        batches = np.unique(owner)
        for some in np.split(batches, range(READERS, len(batches), READERS)):  # bounds the memory
            for batch, column in zip(some, self.columns(some.tolist()), strict=True):
                here = np.flatnonzero(owner == batch)
                yield here, indices[here] - self.starts[batch], column

    def as_split(self, gather: "Gather | None" = None) -> Split:
        """Return the split over these samples; ``gather`` decodes them if they are encoded."""
        return Split(
            take=partial(gather, self) if gather else self.take,
            y=self.y,
            classes=self.header.classes,
            shape=self.header.shape,
            mean=self.mean,
            std=self.std,
            augment=self.header.augment,
            columns=self.header.columns,
            ids=self.ids,
            tokenizer=self.header.tokenizer,
        )

    def view(self, column: pa.Array) -> np.ndarray:
        """Return a column of pixels or rows as an array over its own memory, without a copy."""
        dtype, shape = self.header.stored
        values = column.buffers()[-1]  # the others mark missing values; this may be padded beyond its values
        flat: np.ndarray = np.frombuffer(values, dtype, count=len(column) * math.prod(shape))
        return flat.reshape(len(column), *shape)


Gather = Callable[[Stored, np.ndarray], np.ndarray]


class Store(Stored):
    """An open store: its columns are views of the mapped file. It pickles as its path.

    Raises ArrowInvalid if the file is truncated or not a store of this format.
    """

    def __init__(self, path: Path):
        self.path = path
        self.name = str(path)
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            self.header = Header.of(reader.schema)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches - 1)]
            last = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
        self.mean, self.std = (tuple(json.loads(last.custom_metadata[name])) for name in ("mean", "std"))
        self._columns = [batch.column("x") for batch in batches]
        self.starts = np.cumsum([0, *map(len, self._columns)])

        def integers(name: str) -> torch.Tensor:
            parts = [batch.column(name).to_numpy() for batch in batches]
            return torch.from_numpy(np.concatenate(parts))

        self.y = integers("y")  # [n]
        self.ids = integers("id") if self.header.has_ids else None  # [n]

    def __reduce__(self) -> tuple[type["Store"], tuple[Path]]:
        return Store, (self.path,)

    def columns(self, batches: list[int]) -> Iterable[pa.Array]:
        """Return the column ``x`` of some record batches."""
        return [self._columns[batch] for batch in batches]

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Gather pixels [b, H, W, C] or rows [b, D]."""
        if len(self._columns) == 1:  # a single copy
            return self.view(self._columns[0]).take(indices, axis=0)
        return super().take(indices)


def write(path: Path, header: Header, blocks: Iterable[Block]) -> None:
    """Stream blocks into a store file, in record batches of at most ``BATCH_BYTES``."""
    moments = Moments()
    write_batches(path, header, record_batches(header.schema, blocks, moments, BATCH_BYTES), moments)


def write_batches(path: Path, header: Header, batches: Iterable[pa.RecordBatch], statistics: Moments | Stored) -> None:
    """Stream record batches into a store file; the statistics are read after the last one."""
    schema = header.schema
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
        # The file's own metadata precedes the batches, so the statistics are the metadata of an empty last batch.
        last = pa.RecordBatch.from_pylist([], schema)
        facts = {"mean": json.dumps(statistics.mean), "std": json.dumps(statistics.std)}
        writer.write_batch(last, custom_metadata=facts)


def record_batches(schema: pa.Schema, blocks: Iterable[Block], moments: Moments, most: int) -> Iterator[pa.RecordBatch]:
    """Convert blocks to record batches of at most ``most`` bytes, unless a block has more, and update the moments."""
    kind = schema.field("x").type

    def batch_of(block: Block) -> pa.RecordBatch:
        moments.update(block.sample)
        if isinstance(block.x, list):
            x = pa.array(block.x, kind)
        elif pa.types.is_fixed_size_list(kind):
            x = pa.FixedSizeListArray.from_arrays(pa.array(block.x.reshape(-1)), type=kind)
        else:
            no_bitmap = None  # no value is missing
            pixels = pa.py_buffer(np.ascontiguousarray(block.x))
            x = pa.FixedSizeBinaryArray.from_buffers(kind, len(block.x), [no_bitmap, pixels])
        ids = [] if block.ids is None else [pa.array(block.ids, pa.int64())]
        return pa.record_batch([x, pa.array(block.y, pa.int64()), *ids], schema)

    return merged_batches(map(batch_of, blocks), most)


def merged_batches(batches: Iterable[pa.RecordBatch], most: int) -> Iterator[pa.RecordBatch]:
    """Join consecutive record batches, at least one, up to ``most`` bytes."""
    pending: list[pa.RecordBatch] = []
    size = 0  # bytes of the pending batches
    for batch in batches:
        if pending and size + batch.nbytes > most:
            yield pa.concat_batches(pending)
            pending, size = [], 0
        pending.append(batch)
        size += batch.nbytes
    yield pa.concat_batches(pending)

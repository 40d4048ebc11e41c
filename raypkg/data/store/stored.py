"""What is stored of samples, in whatever files: pixels, encoded samples or rows, their labels and their statistics."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch

from raypkg.data.split import Split, Take

FORMAT = 1


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

    @property
    def bytes(self) -> int:
        """The size of x."""
        return sum(map(len, self.x)) if isinstance(self.x, list) else self.x.nbytes


class Statistics(Protocol):
    """Mean and standard deviation of a store's samples."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel or column."""

    @property
    def std(self) -> tuple[float, ...]:
        """Likewise the standard deviation."""


def in_json(statistics: Statistics) -> dict[str, str]:
    """Return statistics as Arrow's metadata can hold them."""
    return {"mean": json.dumps(statistics.mean), "std": json.dumps(statistics.std)}


def statistics_in(metadata: Mapping[Any, bytes]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read mean and standard deviation back from Arrow's metadata."""
    mean, std = (tuple(json.loads(metadata[name])) for name in ("mean", "std"))
    return mean, std


class Stored(ABC):
    """Samples as they are stored, wherever that is.

    Attributes:
        name: tells the user where they lie.
        header: what they are.
        y: the labels, int64 [n].
        ids: int64 [n], or None where there are none.
        mean: of each channel or column.
        std: likewise the standard deviation.
    """

    name: str
    header: Header
    y: torch.Tensor
    ids: torch.Tensor | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.y)

    @abstractmethod
    def take(self, indices: np.ndarray) -> np.ndarray:
        """Gather pixels [b, H, W, C] or rows [b, D]."""

    @abstractmethod
    def encoded(self, indices: np.ndarray) -> list[pa.Buffer]:
        """Return the bytes of encoded samples."""

    def as_split(self, decoder: "Decoder | None" = None) -> Split:
        """Return the split over these samples; ``decoder`` makes the gather where they are encoded."""
        return Split(
            take=decoder(self) if decoder else self.take,
            y=self.y,
            classes=self.header.classes,
            shape=self.header.shape,
            mean=self.mean,
            std=self.std,
            augment=self.header.augment,
            columns=self.header.columns,
            ids=self.ids,
        )

    def view(self, column: pa.Array) -> np.ndarray:
        """Return a column of pixels or rows as an array over its own memory, without a copy."""
        values = column.buffers()[-1]  # the others hold which values are missing
        return _over(values, self.dtype, (len(column), *self.sample_shape))

    @property
    def dtype(self) -> type:
        """Of pixels or rows."""
        return np.float32 if self.header.kind == "rows" else np.uint8

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of pixels [H, W, C], a batch of which is an image tensor in channels_last memory, or of a row [D]."""
        if self.header.kind == "rows":
            return self.header.shape
        channels, height, width = self.header.shape
        return height, width, channels


Decoder = Callable[[Stored], Take]


def _over(values: pa.Buffer, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    # The buffer may be longer than its values: Arrow pads it.
    flat: np.ndarray = np.frombuffer(values, dtype, count=int(np.prod(shape)))
    return flat.reshape(shape)

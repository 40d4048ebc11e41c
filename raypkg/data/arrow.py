"""The store: samples in a memory-mapped Arrow IPC file, built once and shared by every process of a machine.

Column ``x`` holds pixels (fixed-size binary, H·W·C bytes), encoded images (large binary) or float32 rows (fixed-size
list); column ``y`` the label. Record batches are bounded, so a set may be larger than memory on the way in and out.
The statistics are known only at the end: they travel as the metadata of an empty last record batch.
"""

import json
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from raypkg.core.errors import UserError

from .moments import Moments
from .split import Split, Take

FORMAT = 1
BATCH_BYTES = 256 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Header:
    """What is known before the first sample is written."""

    kind: Literal["pixels", "encoded", "rows"]
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    augment: tuple[str, ...] = ()

    @property
    def x_type(self) -> pa.DataType:
        """The Arrow type of column ``x``."""
        size = int(np.prod(self.shape))
        return {"pixels": pa.binary(size), "encoded": pa.large_binary(), "rows": pa.list_(pa.float32(), size)}[self.kind]


class Block(NamedTuple):
    """A few samples on their way into a store."""

    x: np.ndarray | list[bytes]  # uint8 [m, H, W, C], float32 [m, D], or encoded images
    y: np.ndarray  # int64 [m]
    sample: np.ndarray  # what the statistics are taken from: x itself, or some of the images, decoded


class Store:
    """An open store: the columns as views of the mapped file; pickles as its path.

    Raises:
        FileNotFoundError: there is no such file.
        pyarrow.ArrowInvalid: the file is truncated, corrupt or of another format version.
    """

    def __init__(self, path: Path):
        self.path = path
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            self.header = _header(reader.schema)
            *batches, (_, moments) = map(reader.get_batch_with_custom_metadata, range(reader.num_record_batches))
        if not moments:
            raise pa.ArrowInvalid("the statistics are missing")
        self.mean, self.std = (tuple(json.loads(moments[key])) for key in (b"mean", b"std"))
        self._columns = [batch.column("x") for batch, _ in batches]
        self._starts = [0, *accumulate(map(len, self._columns))]
        self._views = [] if self.header.kind == "encoded" else [self._view(column) for column in self._columns]
        self.y = torch.from_numpy(np.concatenate([batch.column("y").to_numpy() for batch, _ in batches]))  # [n]

    def __reduce__(self) -> tuple[type["Store"], tuple[Path]]:
        return Store, (self.path,)

    def _view(self, column: pa.Array) -> np.ndarray:
        dtype = np.uint8 if self.header.kind == "pixels" else np.float32
        flat = np.frombuffer(column.buffers()[-1], dtype, count=len(column) * int(np.prod(self.header.shape)))
        return flat.reshape(len(column), *_stored(self.header.shape))

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Gather pixels [b, H, W, C] or rows [b, D]: one fancy index for each record batch that is touched."""
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
        return Split(take or self.take, self.y, header.classes, header.shape, self.mean, self.std, header.augment)


def write(path: Path, header: Header, blocks: Iterable[Block]) -> None:
    """Stream blocks into a store file, one record batch of at most ``BATCH_BYTES`` at a time."""
    schema = pa.schema({"x": header.x_type, "y": pa.int64()}, {b"effray": json.dumps({"format": FORMAT, **asdict(header)})})
    moments = Moments()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in _record_batches(header, blocks, schema, moments):
            writer.write_batch(batch)
        statistics = {"mean": json.dumps(moments.mean), "std": json.dumps(moments.std)}
        writer.write_batch(schema.empty_table().to_batches()[0], custom_metadata=statistics)


def cached(path: Path, build: Callable[[Path], None]) -> Store:
    """Open the store at ``path``; if it is missing or damaged, one process builds it and the others wait.

    Raises:
        UserError: the cache folder cannot be written, for instance because the disk is full.
    """
    store = _opened(path)
    if store:
        return store
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            return _opened(path) or _built(path, build)
    except OSError as error:
        raise UserError(f"cannot write the data cache {str(path)!r}: {error.strerror or error}") from error


def cache_path(cache: Path | None, stem: str, key: str) -> Path:
    """Return the file of a store in the given or the default cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effray"
    return Path(cache or os.environ.get("EFFRAY_CACHE") or user) / f"{stem}-{key}.arrow"


def fingerprint(files: Iterable[Path], **options: object) -> str:
    """Return a short name of the source: files with their sizes and times, options and the store's format."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return blake2b(repr((FORMAT, stats, sorted(options.items()))).encode(), digest_size=8).hexdigest()


def _header(schema: pa.Schema) -> Header:
    fields = json.loads((schema.metadata or {}).get(b"effray", b"{}"))
    if fields.pop("format", None) != FORMAT:
        raise pa.ArrowInvalid(f"not a store of format {FORMAT}")
    return Header(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def _stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[1:], shape[0]) if len(shape) == 3 else shape  # images lie as [H, W, C]

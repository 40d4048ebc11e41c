"""Parquet files of encoded images, in the layout in which data sets are published on the hub."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from raypkg.core.errors import UserError, unknown
from raypkg.data.split import Split
from raypkg.data.store.cache import cache_folder, fingerprint
from raypkg.data.store.images import Examples, ImageSource

from . import dataset

LABELS = ("label", "fine_label", "labels", "coarse_label")
IMAGES = ("image", "img")
PREFIXES = {"train": ("train",), "test": ("test", "valid")}  # `valid` stands in where there is no `test`
READ_AT_ONCE = 256


@dataset("parquet")
def load(root: str, *, split: str, cache: Path | None, label: str = "", size: Annotated[int, Field(ge=0)] = 0) -> Split:
    """Parquet files named train*, test* or valid* in PATH: a column of encoded images and a column of labels.

    The image column is found by its type, a binary or a struct with ``bytes``; class names are those of the hub's
    schema metadata, else the numbers. ``label`` names the label column where it is not one of the usual.

    Raises:
        UserError: missing, unreadable or wrong files, columns, labels or images; several sizes while ``size`` is 0.
    """
    files = {name: _files(Path(root), name) for name in PREFIXES}
    key = fingerprint(files["train"] + files["test"], label=label, size=size)
    stem = f"{cache_folder(cache)}/{Path(root).resolve().stem}"

    def examples(name: str) -> Examples:
        train = ImageTable(files["train"], label)
        table = ImageTable(files[name], label)
        return Examples(len(table), train.classes, table.batches, table.name)

    return ImageSource(lambda name: Path(f"{stem}-{name}-{key}.arrow"), examples, size).split(split)


@dataclass(frozen=True)
class ImageTable:
    """The files of one split, read as one table of images and labels."""

    files: list[Path]
    chosen_label: str

    @cached_property
    def _metadata(self) -> list[pq.FileMetaData]:
        return [_metadata(file) for file in self.files]

    @cached_property
    def _schema(self) -> pa.Schema:
        """The schema of the first file, which the others must share."""
        first, *others = [metadata.schema.to_arrow_schema() for metadata in self._metadata]
        for file, schema in zip(self.files[1:], others, strict=True):
            if not schema.equals(first):
                raise UserError(f"the columns of {str(file)!r} differ from those of {str(self.files[0])!r}")
        return first

    @cached_property
    def _image(self) -> str:
        columns = [field.name for field in self._schema if _holds_bytes(field.type)]
        found = [name for name in columns if name in IMAGES] or columns
        if len(found) != 1:
            what = "several image columns" if found else "no image column (binary, or a struct with bytes)"
            raise UserError(f"{str(self.files[0])!r} has {what} among {', '.join(self._schema.names)}")
        return found[0]

    @cached_property
    def _label(self) -> str:
        found = [name for name in ([self.chosen_label] if self.chosen_label else LABELS) if name in self._schema.names]
        if not found:
            raise unknown(f"label column of {str(self.files[0])!r}", self.chosen_label or LABELS[0], self._schema.names)
        kind = self._schema.field(found[0]).type
        if not pa.types.is_integer(kind):
            raise UserError(f"label column {found[0]!r} of {str(self.files[0])!r} is {kind}, needed are integers")
        return found[0]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The class names of the schema metadata, else the label numbers, which must then have no gaps."""
        features = (
            json.loads((self._schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        )
        names = features.get(self._label, {}).get("names")
        if names:
            return tuple(names)
        seen = pc.unique(pq.ParquetDataset(self.files).read([self._label])[self._label]).drop_null().to_pylist()
        if sorted(seen) != list(range(len(seen))):
            raise UserError(f"labels of {str(self.files[0])!r} are {min(seen)} … {max(seen)} with gaps or not from 0")
        return tuple(map(str, sorted(seen)))

    def __len__(self) -> int:
        return sum(metadata.num_rows for metadata in self._metadata)

    def name(self, i: int) -> str:
        """Tell the user where the i-th row stands."""
        for file, metadata in zip(self.files, self._metadata, strict=True):
            if i < metadata.num_rows:
                return f"row {i} of {str(file)!r}"
            i -= metadata.num_rows
        raise IndexError(i)

    def batches(self) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """Stream encoded images and labels int64, a bounded number of rows at a time."""
        start = 0
        for file in self.files:
            for batch in pq.ParquetFile(file).iter_batches(READ_AT_ONCE, columns=[self._image, self._label]):
                images, labels = batch.column(self._image), batch.column(self._label)
                images = pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images
                self._refuse_nulls(images, "image", start)
                self._refuse_nulls(labels, "label", start)
                yield images.to_pylist(), labels.cast(pa.int64()).to_numpy()
                start += len(batch)

    def _refuse_nulls(self, column: pa.Array, what: str, start: int) -> None:
        if column.null_count:
            raise UserError(f"{self.name(start + pc.index(column.is_null(), True).as_py())} has no {what}")


def _files(root: Path, split: str) -> list[Path]:
    """List the files of a split, known by the prefix of their name."""
    if not root.exists():
        raise UserError(f"parquet path {str(root)!r} does not exist")
    files = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    for prefix in PREFIXES[split]:
        found = [file for file in files if file.name.startswith(prefix)]
        if found:
            return found
    names = ", ".join(sorted({file.name for file in files})[:3]) or "no parquet file"
    raise UserError(
        f"{str(root)!r} has no {split} split: no file named {'* or '.join(PREFIXES[split])}*, found {names}"
    )


def _metadata(file: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{str(file)!r} is no readable parquet file: {error}") from None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

"""Parquet files of encoded images, in the layout in which data sets are published on the hub."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypkg.core.errors import UserError, unknown
from raypkg.data.files import Place, open_input, place_of
from raypkg.data.split import Split
from raypkg.data.store.cache import Cache, fingerprint, store_path
from raypkg.data.store.fetching import READERS, fetched
from raypkg.data.store.hub import LABELS, PREFIXES, class_names, split_files
from raypkg.data.store.images import Examples, ImageSource, Side
from raypkg.data.store.importing import beginning_at
from raypkg.data.store.rows import check_distinct, reading

from . import dataset

IMAGES = ("image", "img")
READ_AT_ONCE = 256
READ_AHEAD = 256 << 20  # bytes of row groups that are fetched at once


@dataset("parquet")
def load(
    root: str,
    *,
    split: str,
    cache: Cache,
    label: str = "",
    size: Side = 0,
) -> Split:
    """Parquet files named train*, test* or valid* in PATH: a column of encoded images and a column of labels.

    The image column is found by its type, a binary or a struct with ``bytes``; class names are those of the hub's
    schema metadata, else the numbers. ``label`` names the label column where it is not one of the usual.

    Raises:
        UserError: missing, unreadable or wrong files, columns, labels or images; several sizes while ``size`` is 0.
    """
    place = place_of(root)
    files = {name: split_files(place, name, "parquet", [".parquet"]) for name in PREFIXES}
    key = fingerprint(files["train"] + files["test"], label=label, size=size)

    def examples(name: str) -> Examples:
        train = ImageTable(files["train"], label)
        table = ImageTable(files[name], label)
        table.check_names(train)
        return Examples(len(table), train.classes, table.batches, table.name)

    path = partial(store_path, cache, place.resolve().stem, key)
    return ImageSource(path, examples, size, files).split(split)


@dataclass(frozen=True)
class ImageTable:
    """The files of one split, read as one table of images and labels."""

    files: list[Place]
    chosen_label: str

    @cached_property
    def _metadata(self) -> list[pq.FileMetaData]:
        return list(fetched(_metadata, self.files))

    @cached_property
    def _schema(self) -> pa.Schema:
        """The schema of the first file, which the others must share."""
        schemas = [_schema(file, metadata) for file, metadata in zip(self.files, self._metadata, strict=True)]
        first = schemas[0]
        check_distinct(first.names, self.files[0])
        differing = [file for file, schema in zip(self.files, schemas, strict=True) if not schema.equals(first)]
        if differing:
            raise UserError(f"the columns of {str(differing[0])!r} differ from those of {str(self.files[0])!r}")
        return first

    @cached_property
    def _image(self) -> str:
        columns = [field.name for field in self._schema if _holds_bytes(field.type)]
        usual = [name for name in columns if name in IMAGES]
        candidates = usual or columns
        if len(candidates) != 1:
            what = "several image columns" if candidates else "no image column (binary, or a struct with bytes)"
            raise UserError(f"{str(self.files[0])!r} has {what} among {', '.join(self._schema.names)}")
        return candidates[0]

    @cached_property
    def _label(self) -> str:
        file = str(self.files[0])
        wanted = (self.chosen_label,) if self.chosen_label else LABELS
        label = next((name for name in wanted if name in self._schema.names), None)
        if label is None:
            raise unknown(f"label column of {file!r}", wanted[0], self._schema.names)
        kind = self._schema.field(label).type
        if not pa.types.is_integer(kind):
            raise UserError(f"label column {label!r} of {file!r} is {kind}, needed are integers")
        return label

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The class names of the schema metadata, else the label numbers, which must then have no gaps."""
        if self.names:
            return self.names
        numbers = sorted(self._numbers())
        if numbers != list(range(len(numbers))):
            raise UserError(
                f"labels of {str(self.files[0])!r} are {numbers[0]} … {numbers[-1]} with gaps or not from 0"
            )
        return tuple(map(str, numbers))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The class names of the first file's schema metadata; none where it has none."""
        return class_names(self._schema, self._label, self.files[0])

    def check_names(self, train: "ImageTable") -> None:
        """Refuse class names other than those of the train split: a label would be of another class."""
        if self.names and train.names and self.names != train.names:
            theirs = ", ".join(train.names)
            raise UserError(f"the class names of {str(self.files[0])!r} are {', '.join(self.names)}, not {theirs}")

    def _numbers(self) -> set[int]:
        """Return the labels that occur."""
        numbers: set[int] = set()
        for file in self.files:
            with reading(file):
                labels = pq.ParquetFile(open_input(file)).read([self._label])[self._label]
            numbers.update(pc.unique(labels).drop_null().to_pylist())
        return numbers

    def __len__(self) -> int:
        return sum(metadata.num_rows for metadata in self._metadata)

    def name(self, i: int) -> str:
        """Tell the user where the i-th row stands."""
        for file, metadata in zip(self.files, self._metadata, strict=True):
            if i < metadata.num_rows:
                return f"row {i} of {str(file)!r}"
            i -= metadata.num_rows
        raise IndexError(i)

    def batches(self, start: int = 0) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """Stream encoded images and labels, integers of any kind, a bounded number of rows at a time.

        Args:
            start: the row to begin at, the first of a batch; row groups before it are not read.
        """
        for batch in self._record_batches(start):
            images = batch.column(self._image)
            if pa.types.is_struct(images.type):
                images = pc.struct_field(images, "bytes")
            labels = batch.column(self._label)
            self._refuse_nulls(images, "image", start)
            self._refuse_nulls(labels, "label", start)
            yield images.to_pylist(), labels.to_numpy()
            start += len(batch)

    def _record_batches(self, start: int) -> Iterator[pa.RecordBatch]:
        groups = [
            RowGroup(file, metadata, number)
            for file, metadata in zip(self.files, self._metadata, strict=True)
            for number in range(metadata.num_row_groups)
        ]
        ends = accumulate(group.rows for group in groups)
        kept = [group for group, end in zip(groups, ends, strict=True) if end > start]
        skipped = len(self) - sum(group.rows for group in kept)
        return beginning_at(start - skipped, self._read(kept), len)

    def _read(self, groups: list["RowGroup"]) -> Iterator[pa.RecordBatch]:
        columns = [self._image, self._label]
        largest = max((group.size for group in groups), default=1)
        at_once = READ_AHEAD // max(1, largest)
        if at_once:
            for batches in fetched(lambda group: list(group.batches(columns)), groups, min(at_once, READERS)):
                yield from batches
        else:  # a group is too much to be held
            for group in groups:
                yield from group.batches(columns)

    def _refuse_nulls(self, column: pa.Array, what: str, start: int) -> None:
        if column.null_count:
            first = pc.index(column.is_null(), True).as_py()
            raise UserError(f"{self.name(start + first)} has no {what}")


class RowGroup(NamedTuple):
    """What is read of a parquet file at once."""

    file: Place
    metadata: pq.FileMetaData
    number: int

    @property
    def rows(self) -> int:
        """Samples in the group."""
        count: int = self.metadata.row_group(self.number).num_rows
        return count

    @property
    def size(self) -> int:
        """Bytes of all columns, unpacked."""
        size: int = self.metadata.row_group(self.number).total_byte_size
        return size

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of the group, a bounded number at a time."""
        with reading(self.file):
            file = pq.ParquetFile(open_input(self.file), metadata=self.metadata)
            yield from file.iter_batches(READ_AT_ONCE, [self.number], columns)


def _metadata(file: Place) -> pq.FileMetaData:
    with reading(file):
        return pq.read_metadata(open_input(file))


def _schema(file: Place, metadata: pq.FileMetaData) -> pa.Schema:
    with reading(file):
        return metadata.schema.to_arrow_schema()


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

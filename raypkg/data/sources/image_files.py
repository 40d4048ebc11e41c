"""Image files in folders, a folder a class, and encoded images in parquet, as data sets are published on the hub."""

import re
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import islice
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from raypkg.core.errors import UserError
from raypkg.core.memory import check_read
from raypkg.data.files import (
    PREFIXES,
    READERS,
    ROW_BYTES,
    Place,
    fetched,
    files_below,
    label_column,
    open_input,
    place_of,
    reading,
    split_files,
    split_rows,
)
from raypkg.data.split import Split
from raypkg.data.store.cache import Cache, beginning_at, fingerprint, store_path
from raypkg.data.store.images import Side, open_images

from . import dataset

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
FOLDERS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
LIKE_A_SPLIT = re.compile(r"(train|test|val|valid|dev|eval)(ing|ation|s|[ _-]?set)?")
IMAGES = ("image", "img")
READ_AT_ONCE = 256  # images
READ_AHEAD = 256 << 20  # bytes of row groups fetched at once


# Folders


@dataset("folder")
def folder(
    root: str, *, split: str, cache: Cache, size: Side = 0, test: Annotated[float, Field(ge=0, lt=1)] = 0.2
) -> Split:
    """Image files in one folder a class: PATH/train/<class>/… and PATH/test (val, valid, validation)/<class>/….

    Without a folder of test images the share ``test`` of the others is the test split, drawn by their number alone;
    these may then be in PATH/<class>/…. A class may keep its files in folders of its own, not in links. Class numbers
    follow the sorted names of train's.

    Raises:
        UserError: a missing or empty folder, a class of test unknown to train, broken links, files that are unreadable
            or no images, or images of several sizes while ``size`` is 0.
    """
    place = place_of(root)
    found = {
        name: next((place / each for each in spellings if (place / each).is_dir()), None)
        for name, spellings in FOLDERS.items()
    }
    visible = {each.name for each in place.iterdir() if each.is_dir() and each.name[0] != "."} if place.is_dir() else ()
    astray = {each for each in visible if found["train"] or LIKE_A_SPLIT.fullmatch(each.casefold())} - {"train"}
    for name, spellings in FOLDERS.items():
        if not found[name] and (astray or not visible):  # a split spelled otherwise is not taken for a class
            raise UserError(f"folder {root!r} has no {name} split: none of the folders {', '.join(spellings)}")
    parent = found["train"] or place
    classes = tuple(sorted(_class_folders(parent)))
    images = {"train": images_of(parent, classes)}
    drawn = {}
    if found["test"]:
        images["test"] = images_of(found["test"], classes)
    else:
        everything, drawn = images["train"], {"test": test}
        for name in FOLDERS:
            rows = split_rows(dict.fromkeys(FOLDERS, parent), name, everything.length, test)
            files_of_split = [everything.files[row] for row in rows]
            images[name] = ImageFiles(classes, files_of_split, everything.labels[rows])
    files = {name: each.files for name, each in images.items()}
    key = fingerprint(files["train"] + files["test"], root=root, size=size, **drawn)
    return open_images(split, partial(store_path, cache, place.resolve().name, key), images.__getitem__, files, size)


def _class_folders(folder: Place) -> dict[str, Place]:
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    classes = {path.name: path for path in visible if path.is_dir()}
    if lost := [str(path) for path in visible if not path.exists()]:
        raise UserError(f"{lost[0]!r} is no folder: a link that leads nowhere")
    if not classes:
        raise UserError(f"folder {str(folder)!r} holds no class folders")
    # Bytes of another encoding are surrogates in Python.
    if strange := [name for name in classes if name != name.encode(errors="replace").decode()]:
        raise UserError(f"folder {str(folder)!r} has the class {strange[0]!r}, whose name is not UTF-8")
    return classes


class ImageFiles(NamedTuple):
    """The image files of one split, class by class."""

    classes: tuple[str, ...]
    files: list[Place]
    labels: np.ndarray  # int64 [n]

    @property
    def length(self) -> int:
        """The number of images."""
        return len(self.files)

    def name(self, i: int) -> str:
        """Describe the i-th image for errors."""
        return str(self.files[i])

    def batches(self, start: int = 0) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """Yield encoded images and labels from the image ``start`` on, a bounded number at a time."""
        contents = fetched(content, self.files[start:])
        for first in range(start, len(self.files), READ_AT_ONCE):
            labels = self.labels[first : first + READ_AT_ONCE]
            yield list(islice(contents, len(labels))), labels


def images_of(folder: Place, classes: tuple[str, ...]) -> ImageFiles:
    """List the images of a split; refuse a class unknown to train or without images."""
    found: list[Place] = []
    labels: list[int] = []
    for name, path in sorted(_class_folders(folder).items()):
        if name not in classes:
            raise UserError(f"class {name!r} of {str(folder)!r} is not among the {len(classes)} classes of train")
        files = files_below(path, SUFFIXES)
        if not files:
            raise UserError(f"class folder {str(path)!r} holds no images ({', '.join(sorted(SUFFIXES))})")
        found += files
        labels += [classes.index(name)] * len(files)
    return ImageFiles(classes, found, np.array(labels, np.int64))


def content(file: Place) -> bytes:
    """Read an image file within the limit of memory."""
    try:
        with open_input(file) as stream:
            check_read(f"image {str(file)!r}, one of {READERS} at once", READERS * stream.size())
            return stream.read()
    except OSError as error:
        raise UserError(f"image {str(file)!r} cannot be read: {error.strerror or error}") from None


# Parquet


@dataset("parquet")
def parquet(root: str, *, split: str, cache: Cache, label: str = "", size: Side = 0) -> Split:
    """Parquet files named train*, test* or valid* in PATH: a column of encoded images and a column of labels.

    The image column is found by its type, a binary or a struct with ``bytes``; class names are those of the hub's
    schema metadata, else the numbers. ``label`` names the label column where it is not one of the usual.

    Raises:
        UserError: missing, unreadable or wrong files, columns, labels or images; several sizes while ``size`` is 0.
    """
    place = place_of(root)
    files = {name: split_files(place, name, "parquet", [".parquet"]) for name in PREFIXES}
    key = fingerprint(files["train"] + files["test"], label=label, size=size)

    def table(name: str) -> ImageTable:
        train = ImageTable(files["train"], label)
        if name == "train":
            return train
        other = ImageTable(files[name], label)
        if other.names and train.names and other.names != train.names:  # a label would mean another class
            ours, theirs = (", ".join(each.names) for each in (other, train))
            raise UserError(f"the class names of {str(files[name][0])!r} are {ours}, not {theirs}")
        return other

    return open_images(split, partial(store_path, cache, place.resolve().stem, key), table, files, size)


class ImageTable:
    """The files of one split, read as one table of images and labels."""

    def __init__(self, files: list[Place], label: str):
        self.files = files
        found = list(fetched(_metadata, files))
        self._metadata = [metadata for metadata, _ in found]
        schemas = [schema for _, schema in found]
        self._label, kind, self.names = label_column(files, schemas, label)
        if not pa.types.is_integer(kind):
            raise UserError(f"label column {self._label!r} of {str(files[0])!r} is {kind}, needed are integers")
        check_read(f"the labels of {str(files[0])!r}", ROW_BYTES * self.length)
        schema = schemas[0]
        columns = [field.name for field in schema if _holds_bytes(field.type)]
        candidates = [name for name in columns if name in IMAGES] or columns
        if len(candidates) != 1:
            what = "several image columns" if candidates else "no image column (binary, or a struct with bytes)"
            raise UserError(f"{str(files[0])!r} has {what} among {', '.join(schema.names)}")
        self._image = candidates[0]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The class names of the schema metadata, else the label numbers, which must then have no gaps."""
        if self.names:
            return self.names
        present: set[int] = set()
        for file in self.files:
            with reading(file):
                labels = pq.ParquetFile(open_input(file)).read([self._label])[self._label]
            present.update(pc.unique(labels).drop_null().to_pylist())
        numbers = sorted(present)
        if numbers != list(range(len(numbers))):
            span = f"{numbers[0]} … {numbers[-1]}"
            raise UserError(f"labels of {str(self.files[0])!r} are {span} with gaps or not from 0")
        return tuple(map(str, numbers))

    @property
    def length(self) -> int:
        """The number of images."""
        return sum(metadata.num_rows for metadata in self._metadata)

    def name(self, i: int) -> str:
        """Describe the i-th row for errors."""
        for file, metadata in zip(self.files, self._metadata, strict=True):
            if i < metadata.num_rows:
                return f"row {i} of {str(file)!r}"
            i -= metadata.num_rows
        raise IndexError(i)

    def batches(self, start: int = 0) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """Yield encoded images and labels from the row ``start`` on, a bounded number at a time."""
        groups = []
        end = skipped = 0
        for file, metadata in zip(self.files, self._metadata, strict=True):
            for number in range(metadata.num_row_groups):
                end += metadata.row_group(number).num_rows
                if end > start:
                    groups.append(RowGroup(file, metadata, number, [self._image, self._label]))
                else:  # it is not read
                    skipped = end
        for batch in beginning_at(start - skipped, _read(groups), len):
            images = batch.column(self._image)
            if pa.types.is_struct(images.type):
                images = pc.struct_field(images, "bytes")
            labels = batch.column(self._label)
            for what, column in (("image", images), ("label", labels)):
                if column.null_count:
                    first = pc.index(column.is_null(), True).as_py()
                    raise UserError(f"{self.name(start + first)} has no {what}")
            yield images.to_pylist(), labels.to_numpy()
            start += len(batch)


class RowGroup(NamedTuple):
    """The unit in which a parquet file is read."""

    file: Place
    metadata: pq.FileMetaData
    number: int
    columns: list[str]

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows of the group, a bounded number at a time."""
        with reading(self.file):
            file = pq.ParquetFile(open_input(self.file), metadata=self.metadata)
            yield from file.iter_batches(READ_AT_ONCE, [self.number], self.columns)


def _read(groups: list[RowGroup]) -> Iterator[pa.RecordBatch]:
    largest = max((group.metadata.row_group(group.number).total_byte_size for group in groups), default=1)
    at_once = min(READERS, READ_AHEAD // max(1, largest))

    def held(group: RowGroup) -> list[pa.RecordBatch]:
        found: list[pa.RecordBatch] = []
        size = 0
        for batch in group.batches():
            found.append(batch)
            size += batch.nbytes  # repeated values may expand too far
            what = f"row group {group.number} of {str(group.file)!r}, one of {at_once} at once"
            check_read(what, at_once * size)
        return found

    # A single group may be too large to hold.
    for batches in fetched(held, groups, at_once) if at_once else (group.batches() for group in groups):
        yield from batches


def _metadata(file: Place) -> tuple[pq.FileMetaData, pa.Schema]:
    with reading(file):
        metadata = pq.read_metadata(open_input(file))
        return metadata, metadata.schema.to_arrow_schema()


def _holds_bytes(kind: pa.DataType) -> bool:
    """Return True for a binary column, or a struct with a binary field ``bytes``."""
    kinds = [field.type for field in kind if field.name == "bytes"] if pa.types.is_struct(kind) else [kind]
    return any(pa.types.is_binary(each) or pa.types.is_large_binary(each) for each in kinds)

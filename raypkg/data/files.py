"""Files of a data source, local or behind a URI: which make up a split, and columns that several formats share."""

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pyarrow import fs
from pydantic import AfterValidator, BaseModel, ValidationError

from raypkg.core.address import address_of, is_uri, opened, parted
from raypkg.core.config import first_problem
from raypkg.core.errors import UserError, unknown
from raypkg.core.memory import check_read
from raypkg.core.seeds import generator

from .split import repeated

LABELS = ("label", "fine_label", "labels", "coarse_label")  # names of label columns, the usual one first
PREFIXES = {"train": ("train",), "test": ("test", "valid")}  # `valid` replaces a missing `test`
READERS = 16  # concurrent requests
ROW_BYTES = 16  # of a row besides its values: label and position
VALUE_BYTES = {"BOOLEAN": 1, "INT64": 8, "DOUBLE": 8, "INT96": 12}  # by the type in a parquet file; others take 4
LONGEST_CLASS = 1000  # bytes of a class name

Names = tuple[str, ...]  # folders and a file, from the root of a listing down
J = TypeVar("J")
T = TypeVar("T")


# Paths and URIs


class _Listing:
    """All files at an address or below it, as they were when it was listed, with one request per thousand objects."""

    def __init__(self, address: str):
        base, below = parted(address)
        self.base = address
        self.system, path = opened(base)
        self.root = "/".join([path, *below])  # path of the address in the system
        self.files: dict[Names, fs.FileInfo] = {}  # by names below the root; a root that is a file has no names
        self.folders: dict[Names, set[str]] = {}  # names in each folder
        try:
            found = self.system.get_file_info(self.root)
            is_file = found.type == fs.FileType.File
            entries = [found] if is_file else self.system.get_file_info(fs.FileSelector(self.root, recursive=True))
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{address!r} cannot be listed: {error}") from None
        for entry in entries:
            if entry.type != fs.FileType.File:
                continue
            names = tuple(entry.path.removeprefix(self.root).strip("/").split("/")) if entry.path != self.root else ()
            self.files[names] = entry
            for depth, name in enumerate(names):
                self.folders.setdefault(names[:depth], set()).add(name)


@dataclass(frozen=True)
class _Remote:
    """A file or folder behind a URI, with the attributes and methods of ``Path`` that data sources use.

    Everything below a root is listed once, when the root is created. Later changes are not seen. A folder exists if
    files are below it: object stores have no others.
    """

    listing: _Listing  # equal only to itself
    names: Names = ()

    def __str__(self) -> str:
        return address_of(self.listing.base, self.names)

    def __truediv__(self, name: str) -> "_Remote":
        return _Remote(self.listing, (*self.names, name))

    @property
    def name(self) -> str:
        return PurePosixPath(self.listing.root, *self.names).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    def is_file(self) -> bool:
        return self.names in self.listing.files

    def is_dir(self) -> bool:
        return self.names in self.listing.folders

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator["_Remote"]:
        for name in sorted(self.listing.folders.get(self.names, ())):
            yield self / name

    def resolve(self) -> "_Remote":
        return self  # object stores have no links


Place: TypeAlias = Path | _Remote


def place_of(root: str) -> Place:
    """Return the file or folder at a source's PATH, which must exist; refuse a name that is not UTF-8."""
    if "\0" in root or root != root.encode(errors="replace").decode():  # bytes that Python keeps as surrogates
        raise UserError(f"path {root!r}: its name must be UTF-8 without NUL")
    place = _Remote(_Listing(root)) if is_uri(root) else Path(root)
    if not place.exists():
        raise UserError(f"{root!r} does not exist")
    return place


def files_below(folder: Place, suffixes: Collection[str]) -> list[Place]:
    """Return the files below a folder with some suffixes, sorted; refuse a folder or file that cannot be read."""
    if not isinstance(folder, Path):
        depth = len(folder.names)
        inside = [names for names in sorted(folder.listing.files) if names[:depth] == folder.names != names]
        remote = [_Remote(folder.listing, names) for names in inside]
        return [place for place in remote if place.suffix.lower() in suffixes]

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename!r} cannot be read: {error.strerror}")

    files: list[Path] = []
    for parent, _, names in os.walk(folder, onerror=refuse):
        found = [Path(parent, name) for name in names]
        files += [file for file in found if file.suffix.lower() in suffixes]
    for file in files:
        if not file.is_file():
            raise UserError(f"{str(file)!r} is no file: a link that leads nowhere, a pipe or a device")
    return [*sorted(files)]


def open_input(file: Place) -> pa.NativeFile:
    """Open a file for reading at any position; raises OSError."""
    if isinstance(file, Path):
        return pa.OSFile(os.fsencode(file))
    return file.listing.system.open_input_file("/".join([file.listing.root, *file.names]))


def identity_of(file: Place) -> tuple[str, int, int]:
    """Return address, size in bytes and time of the last change in ns of a file; raises OSError if it is missing."""
    if isinstance(file, Path):
        stat = file.stat()
        return str(file.resolve()), stat.st_size, stat.st_mtime_ns
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} is not there any more")
    info = file.listing.files[file.names]
    return str(file), info.size, info.mtime_ns


def relisted(files: Iterable[Place]) -> list[Place]:
    """Return the same files in their present state: each remote root is listed again, once."""
    listings: dict[str, _Listing] = {}
    now: list[Place] = []
    for file in files:
        if isinstance(file, _Remote):
            base = file.listing.base
            listings[base] = listings.get(base) or _Listing(base)
            file = _Remote(listings[base], file.names)
        now.append(file)
    return now


def fetched(
    load: Callable[[J], T],
    jobs: Iterable[J],
    threads: int = READERS,
    ahead: Callable[[T], int] | None = None,
    wait: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[T]:
    """Yield ``load(job)`` in the order of the jobs, while threads load the next ones, so that latencies overlap.

    As many results as there are threads are ahead, or ``ahead(latest result)``. A result is awaited within ``wait()``.
    """
    pool = ThreadPoolExecutor(threads, "fetching")
    coming = iter(jobs)
    pending: deque[Future[T]] = deque()
    depth = 1 if ahead else threads
    try:
        while True:
            missing = 1 + depth - len(pending)  # one to yield, the others ahead of it
            pending.extend(pool.submit(load, job) for job in islice(coming, max(0, missing)))
            if not pending:
                return
            with wait():
                result = pending.popleft().result()
            if ahead:
                depth = ahead(result)
            yield result
    finally:
        # Do not wait: an abandoned iterator may be closed by the garbage collector, which runs in any thread, even in
        # one that is being started and cannot wait for another.
        pool.shutdown(wait=False, cancel_futures=True)


# Files of a split


def split_files(root: Place, split: str, kind: str, suffixes: Sequence[str]) -> list[Place]:
    """List the files of a split by the prefix of their name, as data sets are published on the hub.

    ``root`` is a file, or a folder that is searched with all folders below it; ``kind`` names the files in errors.
    """
    files = [root] if root.is_file() else [path for path in files_below(root, suffixes) if path.suffix in suffixes]
    for prefix in PREFIXES[split]:
        named = [file for file in files if file.name.startswith(prefix)]
        if named:
            return named
    names = sorted({file.name for file in files})
    some = ", ".join(names[:3]) or f"no {kind} file"
    raise UserError(f"{str(root)!r} has no {split} split: no file named {'* or '.join(PREFIXES[split])}*, found {some}")


def row_files(path: Place, suffixes: tuple[str, ...]) -> dict[str, Place]:
    """Return the single file of each split: train and test in a folder, or one file for both."""
    if not path.is_dir():
        if not path.is_file() or not path.name.endswith(suffixes):
            raise UserError(f"table {str(path)!r} is not a file with one of the endings {', '.join(suffixes)}")
        return dict.fromkeys(PREFIXES, path)
    files = {}
    for split in PREFIXES:
        names = [f"{split}{suffix}" for suffix in suffixes]
        found = [path / name for name in names if (path / name).is_file()]
        if len(found) != 1:
            first = ", ".join(names[:-1])
            raise UserError(f"folder {str(path)!r} needs one of {first} and {names[-1]}, it has {len(found)}")
        files[split] = found[0]
    return files


def split_rows(
    files: Mapping[str, Place], split: str, n: int, test: float, ids: np.ndarray | None = None
) -> np.ndarray:
    """Return the rows of a split among the n rows of its file, int64 ascending; refuse an empty split.

    These are all rows if each split has its own file. In a shared file, the share ``test`` is the test split, by a draw
    that depends only on the number of rows, so that every process and every later run finds the same split. Rows with
    the same id stand for one sample and stay together.
    """
    if files["train"] != files["test"]:
        return np.arange(n)
    sample = np.arange(n) if ids is None else np.unique(ids, return_inverse=True)[1]  # of each row, [n]
    count = int(sample.max()) + 1
    order = torch.randperm(count, generator=generator(0, "test split")).numpy()
    size = round(test * count)
    rows = np.flatnonzero(np.isin(sample, order[:size] if split == "test" else order[size:]))
    if not len(rows):
        raise UserError(f"option test = {test:g} leaves no {split} samples of the {n} in {str(files[split])!r}")
    return rows


# Tables


@contextmanager
def reading(file: Place) -> Iterator[None]:
    """Turn any failure to read a file (damaged, wrong format, not UTF-8, not permitted) into a UserError."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"table {str(file)!r} cannot be read: {error}") from None


def check_parquet(
    file: Place, found: pq.ParquetFile, groups: Iterable[int], columns: Collection[str] | None = None
) -> None:
    """Refuse row groups of a parquet file whose columns (default: all) exceed the limit of memory, by its footer.

    A page of equal values takes a few bytes, whatever their number, so numbers count as they lie in memory. Texts
    count as they are encoded: their dictionary once.
    """
    metadata = found.metadata
    leaves = [metadata.schema.column(i) for i in range(metadata.num_columns)]
    size = 0
    for number in groups:
        group = metadata.row_group(number)
        check_read(f"table {str(file)!r}", group.total_byte_size)
        # Asked about a damaged column, pyarrow ends the process; the reader of its first row raises an error instead.
        next(found.iter_batches(1, row_groups=[number], columns=columns and [*columns]), None)
        size += ROW_BYTES * group.num_rows
        for i, leaf in enumerate(leaves):
            if columns is None or any(f"{leaf.path}.".startswith(f"{name}.") for name in columns):
                column = group.column(i)
                width = max(leaf.length or 0, VALUE_BYTES.get(leaf.physical_type, 4))
                size += max(column.total_uncompressed_size, column.num_values * width)
    check_read(f"table {str(file)!r}", size)


def read_parquet(file: Place, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns (default: all) of a parquet file whose expanded values do not exceed the limit of memory.

    Texts become large strings. They are read as dictionaries first, which says their size before it is taken.
    """
    with reading(file):
        found = pq.ParquetFile(open_input(file))
        check_parquet(file, found, range(found.num_row_groups), columns)
        texts = [field.name for field in found.schema_arrow if _is_text(field.type)]
        table = pq.ParquetFile(open_input(file), metadata=found.metadata, read_dictionary=texts).read(columns)
        table.validate(full=True)  # texts are UTF-8
        check_distinct(table.column_names, file)
        size = 0
        for place, (field, column) in enumerate(zip(table.schema, table.columns, strict=True)):
            if not pa.types.is_dictionary(field.type):
                continue
            kind = field.type.value_type
            if _is_text(kind):
                lengths = [pc.binary_length(chunk.dictionary).take(chunk.indices) for chunk in column.chunks]
                size += sum(pc.sum(each.cast(pa.int64())).as_py() or 0 for each in lengths)
                check_read(f"the texts of {str(file)!r}", size)
                kind = kind if pa.types.is_binary(kind) else pa.large_string()
            chunks = [chunk.dictionary.cast(kind).take(chunk.indices) for chunk in column.chunks]
            table = table.set_column(place, field.with_type(kind), pa.chunked_array(chunks, kind))
        return table


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return any(fits(kind) for fits in (types.is_string, types.is_large_string, types.is_string_view, types.is_binary))


def check_distinct(columns: Sequence[str], file: Place) -> None:
    """Refuse a table with two columns of the same name."""
    if (twice := repeated(columns)) is not None:
        raise UserError(f"table {str(file)!r} has two columns {twice!r} among {', '.join(columns)}")


def check_alike(files: Sequence[Place], schemas: Sequence[pa.Schema]) -> None:
    """Refuse files of one split whose columns differ, and columns of one name."""
    check_distinct(schemas[0].names, files[0])
    for file, other in zip(files, schemas, strict=True):
        if not other.equals(schemas[0]):
            raise UserError(f"the columns of {str(file)!r} differ from those of {str(files[0])!r}")


def label_column(
    files: Sequence[Place], schemas: Sequence[pa.Schema], chosen: str
) -> tuple[str, pa.DataType, tuple[str, ...]]:
    """Return name, type and class names of the label column that the files of a split share.

    It is the chosen one, or else the first of the usual ones. Class names are those of the hub's metadata; () if there
    are none, or if the labels are not integers. All files must have the same columns.
    """
    check_alike(files, schemas)
    schema = schemas[0]
    wanted = (chosen,) if chosen else LABELS
    label = next((name for name in wanted if name in schema.names), None)
    if label is None:
        raise unknown(f"label column of {str(files[0])!r}", wanted[0], schema.names)
    kind = schema.field(label).type
    if not pa.types.is_integer(kind):
        return label, kind, ()
    with noted(schema, "huggingface", files[0]) as metadata:
        features = _HubMetadata.model_validate_json(metadata).info.features
        return label, kind, _Feature.model_validate(features.get(label, {})).names or ()


@contextmanager
def noted(schema: pa.Schema, key: str, file: Place) -> Iterator[bytes]:
    """Yield the JSON under a key of a file's schema metadata; refuse the file if the block finds another form."""
    try:
        yield (schema.metadata or {}).get(key.encode(), b"{}")
    except ValidationError as error:
        raise UserError(f"the schema metadata {key!r} of {str(file)!r}: {first_problem(error)}") from None


def _distinct(names: Names | None) -> Names | None:
    if (twice := repeated(names or ())) is not None:
        raise ValueError(f"has two classes {twice!r}")
    if any(len(name.encode()) > LONGEST_CLASS for name in names or ()):
        raise ValueError(f"has a class whose name is longer than {LONGEST_CLASS:,} bytes")
    return names


Classes = Annotated[Names | None, AfterValidator(_distinct)]


def class_numbers(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Convert labels to the numbers of their classes, int64; raises UserError for a class unknown to train."""
    number = {name: c for c, name in enumerate(classes)}
    strange = set(labels) - number.keys()
    if strange:
        raise unknown("class of the test rows", min(strange), classes)
    return np.array([number[label] for label in labels], np.int64)


class _Feature(BaseModel):
    names: Classes = None  # of a label column


class _Info(BaseModel):
    features: dict[str, Any] = {}  # by column


class _HubMetadata(BaseModel):
    info: _Info = _Info()  # the part that is used of the JSON under the metadata key ``huggingface``

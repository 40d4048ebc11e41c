"""Sparse rows in libsvm's text form, as RCV1 is handed on: ``label column:value column:value …``."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from raypkg.core.errors import UserError
from raypkg.data.files import Place, open_input, place_of
from raypkg.data.memory import check_samples
from raypkg.data.split import Split
from raypkg.data.store.cache import Cache, Target, cached, fingerprint, store_path, write_store
from raypkg.data.store.rows import class_numbers, reading, row_files, split_rows
from raypkg.data.store.stored import Block, Header, Stored

from . import dataset

PACKED = {".bz2": "bz2", ".gz": "gzip"}
SUFFIXES = (".libsvm", ".svm", ".txt", *PACKED)
ENTRY = np.dtype([("column", "<i4"), ("value", "<f4")])  # of a stored row; columns count from 0
MOST_COLUMNS = 2**31  # that an entry can name
DENSE = np.dtype(np.float32)
SHOWN = 40  # characters of what is no label
BLOCK = 1 << 14  # rows on their way into the store


@dataset("libsvm", source="doi:10.1145/1961189.1961199")
def load(
    root: str,
    *,
    split: str,
    cache: Cache,
    columns: Annotated[int, Field(ge=1, le=MOST_COLUMNS)] | None = None,
    test: Annotated[float, Field(ge=0, lt=1)] = 0.2,
) -> Split:
    """Sparse rows in libsvm's form, columns from 1: one file (.bz2 and .gz are unpacked), or a folder with two.

    Of one file, the share ``test`` is the test split, drawn by its length alone. The sorted labels are the classes.
    Rows stay sparse on the disk and become dense float32 batch by batch; they are not standardised, so zero is zero.

    Args:
        root: PATH of a file, or of a folder with train.libsvm and test.libsvm (or another of the endings).
        split: "train" or "test".
        cache: folder of the memory-mapped stores.
        columns: D, when it is more than the largest column that occurs in either file.
        test: share of a single file.

    Raises:
        UserError: missing files, lines in another form, values that are not finite, a column above ``columns``, or more
            columns than fit this machine's memory when rows become dense.
    """
    place = place_of(root)
    files = row_files(place, SUFFIXES)
    key = fingerprint(files.values(), columns=columns, test=test)
    target = store_path(cache, place.resolve().name.partition(".")[0], key, split)

    def build(unfinished: Target) -> None:
        # Both files decide on the width, so both are read whichever split is built.
        tables = {file: read(file) for file in set(files.values())}
        width = max(table.width for table in tables.values())
        if not width:
            raise UserError(f"no row of {root!r} has an entry column:value, so there is nothing to learn from")
        if columns is not None and width > columns:
            raise UserError(f"option columns = {columns}, but {root!r} has column {width}")
        classes = tables[files["train"]].classes
        table = tables[files[split]]
        rows = split_rows(files, split, len(table.rows), test)
        header = Header("encoded", (columns or width,), classes)
        write_store(unfinished, header, table.blocks(rows, classes))

    store = cached(target, build, set(files.values()))
    width = store.header.shape[0]
    _check_width(root, width)
    rows = store.as_split(_Dense)
    return replace(rows, mean=(0.0,) * width, std=(1.0,) * width)  # not standardised: zeros stay zeros


@dataclass(frozen=True)
class SparseTable:
    """One file's rows: the label of each, in one spelling, and its entries, an array of ``ENTRY``."""

    labels: list[str]
    rows: list[np.ndarray]

    @property
    def width(self) -> int:
        """The largest column that occurs, counted from 1."""
        last = max(row["column"].max(initial=-1) for row in self.rows)
        return int(last) + 1

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels that occur, by their value."""
        return tuple(sorted(set(self.labels), key=float))

    def blocks(self, chosen: np.ndarray, classes: tuple[str, ...]) -> Iterator[Block]:
        """Yield the chosen rows in blocks, labels as numbers of their classes."""
        y = class_numbers(self.labels, classes)
        unused = np.zeros((1, 1))  # in place of a sample for the statistics
        for chunk in np.split(chosen, range(BLOCK, len(chosen), BLOCK)):
            yield Block([self.rows[i].tobytes() for i in chunk], y[chunk], unused)


def read(file: Place) -> SparseTable:
    """Return the rows of a file.

    Raises:
        UserError: it cannot be read, has no rows, or a line is in another form.
    """
    labels = []
    rows = []
    with reading(file), pa.input_stream(open_input(file), compression=PACKED.get(file.suffix)) as stream:
        for number, line in enumerate(_lines(stream), 1):
            text = line.partition("#")[0]
            words = text.split()
            if not words:
                continue  # an empty line, or nothing but a remark
            where = f"line {number} of {str(file)!r}"
            if "_" in text or not text.isascii():  # Python would take 1_0 and ١٠ for numbers
                raise UserError(f"{where} is not made of numbers in ASCII")
            labels.append(_label(words[0], where))
            rows.append(_row(words[1:], where))
    if not rows:
        raise UserError(f"table {str(file)!r} has no rows")
    return SparseTable(labels, rows)


def _lines(stream: pa.NativeFile) -> Iterator[str]:
    """Decode a stream that may be compressed, which Arrow reads in blocks only, line by line."""
    rest = b""  # the beginning of a line whose end is in the next block
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from (line.decode() for line in lines)
    yield rest.decode()


def _label(label: str, where: str) -> str:
    """Return a label in one spelling: ``+1``, ``1`` and ``1.0`` are the same class."""
    try:
        value = float(label)
        whole = int(value)
    except (ValueError, OverflowError):  # not a number, NaN, infinity
        raise UserError(f"{where} begins with {label[:SHOWN]!r}, needed is a number, the label") from None
    return str(whole) if value == whole else str(value)


def _row(entries: list[str], where: str) -> np.ndarray:
    try:
        pairs = []
        for entry in entries:
            column, value = entry.split(":")
            pairs.append((int(column) - 1, float(value)))
        with np.errstate(over="ignore"):  # becomes infinity, which is refused below
            row = np.array(pairs, ENTRY)
    except (ValueError, OverflowError):
        raise UserError(f"{where} has an entry that is not column:value") from None
    columns = row["column"]
    if len(columns) and (columns[0] < 0 or (np.diff(columns) <= 0).any()):
        raise UserError(f"{where}: columns must begin at 1 and rise")
    if not np.isfinite(row["value"]).all():
        raise UserError(f"{where} holds NaN or infinity, or a number beyond float32")
    return row


def _check_width(root: str, width: int) -> None:
    what = f"dense rows of {width:,} columns in {root!r}"
    check_samples(what, width * DENSE.itemsize, "number the columns that occur from 1")


@dataclass(frozen=True)
class _Dense:
    """Gathers rows as float32 [b, D]."""

    store: Stored

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        rows = self.store.encoded(indices)
        entries = np.frombuffer(b"".join(rows), ENTRY)
        sizes = [row.size // ENTRY.itemsize for row in rows]
        row_of = np.repeat(np.arange(len(rows)), sizes)  # the row of each entry
        x = np.zeros((len(rows), *self.store.header.shape), DENSE)
        x[row_of, entries["column"]] = entries["value"]
        return x

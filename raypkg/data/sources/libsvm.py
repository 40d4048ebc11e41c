"""Sparse rows in libsvm's text format, as RCV1 is published: ``label column:value column:value …``."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from io import TextIOWrapper
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from raypkg.core.errors import UserError
from raypkg.core.memory import check_read, check_samples, read_limit
from raypkg.data.files import Place, class_numbers, open_input, place_of, reading, row_files, split_rows
from raypkg.data.split import Split
from raypkg.data.store.arrow import Block, Header, Stored
from raypkg.data.store.cache import Cache, stored

from . import dataset

PACKED = {".bz2": "bz2", ".gz": "gzip"}
SUFFIXES = (".libsvm", ".svm", ".txt", *PACKED)
ENTRY = np.dtype([("column", "<i4"), ("value", "<f4")])  # of a stored row; columns count from 0
MOST_COLUMNS = 2**31  # limit of an entry's column
DENSE = np.dtype(np.float32)
LARGEST_LABEL = 2**53 - 1  # float64 rounds some larger ones, so two classes could become one
SHOWN = 40  # characters shown of an invalid label
BLOCK = 1 << 14  # rows written to the store at once
ROW = 256  # bytes of a row in memory, besides its entries: two objects and a label
LINE_BYTES = 64  # that a character of a line may take while it is parsed


@dataset("libsvm", source="doi:10.1145/1961189.1961199")
def load(
    root: str,
    *,
    split: str,
    cache: Cache,
    columns: Annotated[int, Field(ge=1, le=MOST_COLUMNS)] | None = None,
    test: Annotated[float, Field(ge=0, lt=1)] = 0.2,
) -> Split:
    """Sparse rows in libsvm's format, columns from 1: one file (.bz2 and .gz are unpacked), or a folder with two.

    Of one file, the share ``test`` is the test split, drawn by its length alone. The sorted labels are the classes.
    Rows stay sparse on disk and become dense float32 batch by batch; they are not standardised, so zero is zero.

    A folder has train.libsvm and test.libsvm, or another of the endings. ``columns`` is D, if that is larger than the
    largest column in either file.

    Raises:
        UserError: missing files, lines in another format, values that are not finite, a column above ``columns``, or
            more columns than dense rows in this machine's memory can have.
    """
    place = place_of(root)
    files = row_files(place, SUFFIXES)

    def build() -> tuple[Header, Iterator[Block]]:
        # Both files determine the width, so both are read for either split.
        tables = {file: read(file) for file in set(files.values())}
        every_row = [row for _, rows in tables.values() for row in rows]
        width = 1 + int(max(row["column"].max(initial=-1) for row in every_row))
        if not width:
            raise UserError(f"no row of {root!r} has an entry column:value, so there is nothing to learn from")
        if columns is not None and width > columns:
            raise UserError(f"option columns = {columns}, but {root!r} has column {width}")
        train_labels, _ = tables[files["train"]]
        classes = tuple(sorted(set(train_labels), key=float))
        labels, rows = tables[files[split]]
        chosen = split_rows(files, split, len(rows), test)
        y = class_numbers(labels, classes)

        def blocks() -> Iterator[Block]:
            unused = np.zeros((1, 1))  # instead of a sample for the statistics
            for chunk in np.split(chosen, range(BLOCK, len(chosen), BLOCK)):
                yield Block([rows[i].tobytes() for i in chunk], y[chunk], unused)

        return Header("encoded", (columns or width,), classes), blocks()

    name = place.resolve().name.partition(".")[0]
    store = stored(cache, name, split, files.values(), build, columns=columns, test=test)
    (width,) = store.header.shape
    what = f"dense rows of {width:,} columns in {root!r}"
    check_samples(what, width * DENSE.itemsize, "number the columns that occur from 1")
    return replace(store.as_split(_dense), mean=(0.0,) * width, std=(1.0,) * width)


def read(file: Place) -> tuple[list[str], list[np.ndarray]]:
    """Return the label, in a canonical spelling, and the ENTRY array of each row of a file."""
    labels: list[str] = []
    rows: list[np.ndarray] = []
    size = 0  # bytes of the rows in memory
    limit = read_limit()
    longest = limit // LINE_BYTES
    with reading(file), pa.input_stream(open_input(file), compression=PACKED.get(file.suffix)) as stream:
        lines = TextIOWrapper(stream, encoding="utf-8", newline="\n")
        for number, line in enumerate(iter(partial(lines.readline, longest + 1), ""), 1):
            if len(line) > longest:
                check_read(f"line {number} of {str(file)!r}, cut at {longest:,} characters", len(line) * LINE_BYTES)
            words = line.partition("#")[0].split()
            if not words:
                continue  # an empty line, or only a comment
            where = f"line {number} of {str(file)!r}"
            labels.append(_label(words[0], where))
            rows.append(_row(words[1:], where))
            size += ROW + rows[-1].nbytes
            if size > limit:
                check_read(f"table {str(file)!r}, up to line {number}", size)
    if not rows:
        raise UserError(f"table {str(file)!r} has no rows")
    return labels, rows


def _label(label: str, where: str) -> str:
    """Return the canonical spelling of a label: ``+1``, ``1`` and ``1.0`` are the same class."""
    try:
        value = float(label)
        whole = int(value)
        if abs(value) > LARGEST_LABEL:
            raise OverflowError
    except (ValueError, OverflowError):  # not a number, NaN, infinity
        needed = f"a number, the label, up to {LARGEST_LABEL:,}"
        raise UserError(f"{where} begins with {label[:SHOWN]!r}, needed is {needed}") from None
    return str(whole) if value == whole else str(value)


def _row(entries: list[str], where: str) -> np.ndarray:
    try:
        pairs = []
        for entry in entries:
            column, value = entry.split(":")
            pairs.append((int(column) - 1, float(value)))
        with np.errstate(over="ignore"):  # overflows to infinity, refused below
            row = np.array(pairs, ENTRY)
    except (ValueError, OverflowError):
        raise UserError(f"{where} has an entry that is not column:value") from None
    columns = row["column"]
    if len(columns) and (columns[0] < 0 or (np.diff(columns) <= 0).any()):
        raise UserError(f"{where}: columns must begin at 1 and rise")
    if not np.isfinite(row["value"]).all():
        raise UserError(f"{where} holds NaN or infinity, or a number beyond float32")
    return row


def _dense(store: Stored, indices: np.ndarray) -> np.ndarray:
    """Gather rows as float32 [b, D]."""
    rows = store.encoded(indices)
    entries = np.frombuffer(b"".join(rows), ENTRY)
    sizes = [row.size // ENTRY.itemsize for row in rows]
    row_of = np.repeat(np.arange(len(rows)), sizes)  # the row of each entry
    x = np.zeros((len(rows), *store.header.shape), DENSE)
    x[row_of, entries["column"]] = entries["value"]
    return x

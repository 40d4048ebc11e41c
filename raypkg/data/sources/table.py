"""Rows of numbers with labels: tables in parquet or CSV, and sparse rows in libsvm's format, as RCV1 is published.

A parquet column may hold a vector in every row, such as the features of a frozen model. The file's schema metadata may
name, under the key ``effray``, the column of sample ids and the classes in their order.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from io import TextIOWrapper
from itertools import chain
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
from pydantic import BaseModel, Field

from raypkg.core.errors import UserError, unknown
from raypkg.core.memory import check_read, check_samples, read_limit
from raypkg.data.files import (
    LONGEST_CLASS,
    Classes,
    Place,
    check_distinct,
    check_parquet,
    class_numbers,
    identity_of,
    noted,
    open_input,
    place_of,
    read_parquet,
    reading,
    row_files,
    split_rows,
)
from raypkg.data.split import Split
from raypkg.data.store.arrow import Block, Header, Stored
from raypkg.data.store.cache import Cache, stored

from . import dataset

ID = "id"
LABEL = "label"
FEATURES = "features"
NOTES = "effray"  # metadata key
SUFFIXES = (".parquet", ".csv")
BLOCK = 1 << 16  # rows converted at once
BLOCK_BYTES = 64 << 20  # bytes converted at once
LARGEST_ID = 2**63 - 1
LABEL_KINDS = ("integer", "floating", "decimal", "boolean", "date", "string", "large_string")  # by Arrow's names
EXACT = 2**53 - 1  # float64 rounds some larger integers
TOO_LONG = f"is longer than {LONGEST_CLASS:,} bytes"
NAN = {"NaN", "-NaN", "nan", "-nan"}  # refused as numbers, where Arrow would read a missing value
CONVERT = pcsv.ConvertOptions(null_values=[text for text in pcsv.ConvertOptions().null_values if text not in NAN])

# ``label column:value column:value …`` of a sparse row
PACKED = {".bz2": "bz2", ".gz": "gzip"}
SPARSE_SUFFIXES = (".libsvm", ".svm", ".txt", *PACKED)
ENTRY = np.dtype([("column", "<i4"), ("value", "<f4")])  # of a stored row; columns count from 0
MOST_COLUMNS = 2**31  # limit of an entry's column
DENSE = np.dtype(np.float32)
LARGEST_LABEL = 2**53 - 1  # float64 rounds some larger ones, so two classes could become one
SHOWN = 40  # characters shown of an invalid label
SPARSE_BLOCK = 1 << 14  # sparse rows written to the store at once
ROW = 256  # bytes of a sparse row in memory, besides its entries: two objects and a label
LINE_BYTES = 64  # that a character of a line may take while it is parsed


@dataset("table")
def table(
    root: str,
    *,
    split: str,
    cache: Cache,
    label: str = "label",
    id: str = "",
    test: Annotated[float, Field(ge=0, lt=1)] = 0.2,
) -> Split:
    """Parquet or CSV of numeric columns and a column of labels: PATH/train.csv and PATH/test.csv, or one file.

    Of one file, the share ``test`` is the test split, drawn by its length alone. Labels are numbers or texts; their
    sorted values are the classes. Columns become float32; in parquet one may hold lists of floats of a fixed size. The
    column ``id``, named here or by the file itself (as `effray embed` does), is no part of a sample: it states which
    samples of other data the rows stand for.

    Raises:
        UserError: missing or unreadable files, columns that are no numbers, missing values, classes unknown to train.
    """
    place = place_of(root)
    files = row_files(place, SUFFIXES)

    def build() -> tuple[Header, Iterator[Block]]:
        train = RowTable(files["train"], label, id)
        table = train if split == "train" else RowTable(files[split], label, id)
        if table.columns != train.columns:
            raise UserError(f"the columns of {str(files[split])!r} are not those of {str(files['train'])!r}")
        rows = split_rows(files, split, len(table), test, table.ids)
        has_ids = table.ids is not None
        header = Header("rows", (len(train.columns),), train.classes, columns=train.columns, has_ids=has_ids)
        return header, table.blocks(rows, train.classes)

    found = stored(cache, place.resolve().stem, split, files.values(), build, label=label, id=id, test=test)
    return found.as_split()


def features_schema(width: int, classes: Sequence[str]) -> pa.Schema:
    """Return the schema of samples with an id, a label and a vector of ``width`` numbers each."""
    number = pa.field("element", pa.float32(), nullable=False)  # no validity bit per number: twice as fast
    fields = [
        pa.field(ID, pa.int64(), nullable=False),
        pa.field(LABEL, pa.string(), nullable=False),
        pa.field(FEATURES, pa.list_(number, width), nullable=False),
    ]
    return pa.schema(fields, {NOTES: json.dumps({"id": ID, "classes": list(classes)})})


class _Notes(BaseModel):
    id: str = ""  # column
    classes: Classes = None


class RowTable:
    """The rows of one parquet or CSV file: labels and ids are in memory, numbers are read a row group at a time.

    The column ``id`` is by default the one that the file notes. Rows to predict need no labels: with ``wanted``, the
    columns of training (if empty, all), other columns are ignored.
    """

    def __init__(self, file: Place, label: str, id: str = "", *, wanted: Sequence[str] | None = None):
        self.file = file
        self.label = label
        self._parquet = None
        notes = _Notes()
        if file.suffix == ".parquet":
            with reading(file):
                self._parquet = pq.ParquetFile(open_input(file))
            schema = self._parquet.schema_arrow
            self._length: int = self._parquet.metadata.num_rows
            check_distinct(schema.names, file)
            with noted(schema, NOTES, file) as metadata:
                notes = _Notes.model_validate_json(metadata)
        else:
            self._csv = _read_csv(file)
            schema = self._csv.schema
            self._length = self._csv.num_rows
        id = id or notes.id
        if wanted is not None and id not in schema.names:
            id = ""
        if wanted is None and label not in schema.names:
            raise unknown(f"label column of {str(file)!r}", label, schema.names)
        if id and id not in schema.names:
            raise unknown(f"id column of {str(file)!r}", id, schema.names)
        others = [label, id] if id else [label]  # a feature column may have an empty name, too
        fields = [field for field in schema if field.name not in others]
        if not self._length or not fields:
            sizes = f"{self._length} rows and {len(fields)} columns besides {label!r}"
            raise UserError(f"table {str(file)!r} has {sizes}, needed is one of each at least")
        self._elements = self._features(fields, wanted)
        self.columns = tuple(chain(*self._elements.values()))  # a name for each number of a row
        self._noted_classes = notes.classes if wanted is None else None
        self.ids: np.ndarray | None = None  # [n]
        if wanted is not None:
            self._labels = pa.chunked_array([["unknown"] * self._length])
            return
        table = read_parquet(file, others) if self._parquet else self._csv
        self._labels = table[label]
        self._check_label(self._labels)
        if id:
            ids = table[id]
            self._refuse_where(ids.is_null(), id, "has no value")
            if not pa.types.is_integer(ids.type):
                raise UserError(f"id column {id!r} of {str(file)!r} is {ids.type}, needed are integers")
            self.ids = ids.to_numpy()
            outside = pa.chunked_array([(self.ids < 0) | (self.ids > LARGEST_ID)])
            self._refuse_where(outside, id, "holds a number that is not from 0 to 2⁶³ − 1")

    def _features(self, fields: Sequence[pa.Field], wanted: Sequence[str] | None) -> dict[str, list[str]]:
        """Return a name for each number in each column of features; vectors come last."""
        vectors = {field.name: field.type.list_size for field in fields if pa.types.is_fixed_size_list(field.type)}
        elements = {field.name: [field.name] for field in fields if field.name not in vectors}
        elements |= {name: [f"{name}[{i}]" for i in range(size)] for name, size in vectors.items()}
        if wanted:
            known = [*chain(*elements.values())]
            if lost := next((name for name in wanted if name not in known), None):
                raise unknown(f"column of {str(self.file)!r}", lost, known)
            elements = {name: each for name, each in elements.items() if not {*each}.isdisjoint(wanted)}
        for name, kind in ((field.name, field.type) for field in fields if field.name in elements):
            if name in vectors:
                is_number = pa.types.is_floating(kind.value_type) and kind.list_size > 0
            else:
                number = kind.value_type if pa.types.is_dictionary(kind) else kind
                is_number = pa.types.is_floating(number) or pa.types.is_integer(number)
            if not is_number:
                where = f"column {name!r} of {str(self.file)!r}"
                raise UserError(f"{where} is {kind}, needed are numbers, or lists of floats of one size")
        return elements

    def __len__(self) -> int:
        return self._length

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes noted in the file, else the sorted values of the label column."""
        if self._noted_classes:
            return self._noted_classes
        return tuple(map(str, sorted(pc.unique(self._labels).to_pylist())))

    def blocks(self, rows: np.ndarray, classes: tuple[str, ...]) -> Iterator[Block]:
        """Yield ascending rows in blocks, labels as numbers of their classes."""
        size = max(1, min(BLOCK, BLOCK_BYTES // (4 * len(self.columns))))
        for first, table in self._row_groups():
            begin, end = np.searchsorted(rows, [first, first + len(table)])
            if begin == end:
                continue
            columns = [self._numbers(name, table[name].combine_chunks(), first) for name in self._elements]
            for chunk in np.split(rows[begin:end], range(size, end - begin, size)):
                values = np.concatenate([column[chunk - first] for column in columns], axis=1)  # [m, D]
                with np.errstate(over="ignore"):  # overflows to infinity, refused below
                    x = values.astype(np.float32, copy=False)
                if len(broken := np.argwhere(~np.isfinite(x))):
                    row, column = broken[0]
                    value = values[row, column]
                    holds = f"holds {'NaN' if np.isnan(value) else value} in {self._place(int(chunk[row]))}"
                    where = f"column {self.columns[column]!r} of {str(self.file)!r}"
                    raise UserError(f"{where} {holds}, needed are finite numbers that float32 can hold")
                labels = [str(value) for value in self._labels.take(chunk).to_pylist()]
                ids = None if self.ids is None else self.ids[chunk].astype(np.int64)
                yield Block(x, class_numbers(labels, classes), sample=x, ids=ids)

    def _row_groups(self) -> Iterator[tuple[int, pa.Table]]:
        """Yield the feature columns of each row group, after the number of its first row; CSV is a single group."""
        if self._parquet is None:
            yield 0, self._csv
            return
        first = 0
        for group in range(self._parquet.num_row_groups):
            with reading(self.file):
                check_parquet(self.file, self._parquet, [group], self._elements)
                table = self._parquet.read_row_group(group, columns=list(self._elements))
                table.validate()
            yield first, table
            first += len(table)

    def _numbers(self, name: str, column: pa.Array, first: int) -> np.ndarray:
        """Return the numbers of a column in rows from ``first`` on, [m, 1] or, of vectors, [m, D]."""
        where = f"column {name!r} of {str(self.file)!r}"
        if pa.types.is_fixed_size_list(column.type):
            numbers = column.flatten()
            if column.null_count or numbers.null_count:
                raise UserError(f"{where} has no value somewhere in rows {first} to {first + len(column) - 1}")
            return numbers.to_numpy().reshape(len(column), -1)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        self._refuse_where(column.is_null(), name, "has no value", first)
        values = column.to_numpy()
        if pa.types.is_integer(column.type) and column.type.bit_width > 16:
            # float32 would round large integers, and different values, such as two identifiers, would become one.
            lowest = values & -values  # the lowest set bit
            odd = values // np.where(values == 0, 1, lowest)  # the part that the 24 bits of a float32 must hold
            if len(rounded := values[np.abs(odd) > 1 << 24]):
                raise UserError(f"{where} holds {rounded[0]}, which float32 rounds: leave it out or scale it")
        return values[:, None]

    def _check_label(self, labels: pa.ChunkedArray) -> None:
        self._refuse_where(labels.is_null(), self.label, "has no value")
        kind = labels.type
        if not any(getattr(pa.types, f"is_{name}")(kind) for name in LABEL_KINDS):
            where = f"label column {self.label!r} of {str(self.file)!r}"
            raise UserError(f"{where} is {kind}, needed are numbers or texts in UTF-8")
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            self._refuse_where(pc.equal(labels, ""), self.label, "has no value")
            self._refuse_where(pc.greater(pc.binary_length(labels), LONGEST_CLASS), self.label, TOO_LONG)
            self._refuse_where(pc.match_substring(labels, "\n"), self.label, "holds a line break")  # an open quote
        if pa.types.is_floating(kind):
            self._refuse_where(pc.invert(pc.is_finite(labels)), self.label, "holds NaN or infinity")

    def _refuse_where(self, wrong: pa.Array | pa.ChunkedArray, name: str, problem: str, first: int = 0) -> None:
        row = pc.index(wrong, True).as_py()
        if row >= 0:
            raise UserError(f"column {name!r} of {str(self.file)!r} {problem} in {self._place(first + row)}")

    def _place(self, row: int) -> str:
        """Describe the position of a row: a row of parquet from 0, a line of CSV from 1, as editors count."""
        if self.file.suffix == ".parquet":
            return f"row {row}"
        with TextIOWrapper(open_input(self.file), encoding="utf-8", errors="replace") as lines:
            filled = [number for number, line in enumerate(lines, 1) if line != "\n"]  # Arrow skips empty lines
        _header, *numbers = filled
        return f"line {numbers[row]}"


def _read_csv(file: Place) -> pa.Table:
    with reading(file):
        check_read(f"table {str(file)!r}", identity_of(file)[1])
        table = pcsv.read_csv(open_input(file), convert_options=CONVERT)
        check_distinct(table.column_names, file)
        # Arrow reads integers as float64 if one has more than 64 bits or another value is no integer.
        floats = [name for name in table.column_names if pa.types.is_floating(table[name].type)]
        large = [name for name in floats if (pc.max(pc.abs(table[name])).as_py() or 0) > EXACT]
        convert = pcsv.ConvertOptions(column_types=dict.fromkeys(large, pa.string()), include_columns=large)
        for name in large:
            texts = pcsv.read_csv(open_input(file), convert_options=convert)[name]
            whole = texts.filter(pc.match_substring_regex(texts, r"^\s*[-+]?\d{16,300}\s*$")).to_pylist()
            if rounded := [text for text in whole if int(float(text)) != int(text)]:
                raise UserError(f"column {name!r} of {str(file)!r} holds {rounded[0]}, which float64 rounds")
        return table


# Sparse rows


@dataset("libsvm", source="doi:10.1145/1961189.1961199")
def libsvm(
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
    files = row_files(place, SPARSE_SUFFIXES)

    def build() -> tuple[Header, Iterator[Block]]:
        # Both files determine the width, so both are read for either split.
        tables = {file: read_sparse(file) for file in set(files.values())}
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
            for chunk in np.split(chosen, range(BLOCK, len(chosen), SPARSE_BLOCK)):
                yield Block([rows[i].tobytes() for i in chunk], y[chunk], unused)

        return Header("encoded", (columns or width,), classes), blocks()

    name = place.resolve().name.partition(".")[0]
    store = stored(cache, name, split, files.values(), build, columns=columns, test=test)
    (width,) = store.header.shape
    what = f"dense rows of {width:,} columns in {root!r}"
    check_samples(what, width * DENSE.itemsize, "number the columns that occur from 1")
    return replace(store.as_split(_dense), mean=(0.0,) * width, std=(1.0,) * width)


def read_sparse(file: Place) -> tuple[list[str], list[np.ndarray]]:
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
            labels.append(_sparse_label(words[0], where))
            rows.append(_sparse_row(words[1:], where))
            size += ROW + rows[-1].nbytes
            if size > limit:
                check_read(f"table {str(file)!r}, up to line {number}", size)
    if not rows:
        raise UserError(f"table {str(file)!r} has no rows")
    return labels, rows


def _sparse_label(label: str, where: str) -> str:
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


def _sparse_row(entries: list[str], where: str) -> np.ndarray:
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

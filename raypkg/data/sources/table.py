"""Tables: parquet or CSV files with numeric columns and a label.

A parquet column may hold a vector in every row, such as the features of a frozen model. The file's schema metadata may
name, under the key ``effray``, the column of sample ids and the classes in their order.
"""

import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import TextIOWrapper
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
from pydantic import BaseModel, Field

from raypkg.core.errors import UserError, unknown
from raypkg.core.memory import check_read
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
from raypkg.data.store.arrow import Block, Header
from raypkg.data.store.cache import Cache, Target, cached, fingerprint, store_path, write_store

from . import dataset

ID = "id"
LABEL = "label"
FEATURES = "features"
NOTES = "effray"  # metadata key
SUFFIXES = (".parquet", ".csv")
BLOCK = 1 << 16  # rows converted at once
BLOCK_BYTES = 64 << 20  # bytes of vectors converted at once
LARGEST_ID = 2**63 - 1
LABEL_KINDS = ("integer", "floating", "decimal", "boolean", "date", "string", "large_string")  # by Arrow's names
EXACT = 2**53 - 1  # float64 rounds some larger integers
TOO_LONG = f"is longer than {LONGEST_CLASS:,} bytes"
NAN = {"NaN", "-NaN", "nan", "-nan"}  # refused as numbers, where Arrow would read a missing value
CONVERT = pcsv.ConvertOptions(null_values=[text for text in pcsv.ConvertOptions().null_values if text not in NAN])


@dataset("table")
def load(
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
    key = fingerprint(files.values(), label=label, id=id, test=test)
    target = store_path(cache, place.resolve().stem, key, split)

    def build(unfinished: Target) -> None:
        train = RowTable(files["train"], label, id)
        table = train if split == "train" else RowTable(files[split], label, id)
        if table.columns != train.columns:
            raise UserError(f"the columns of {str(files[split])!r} are not those of {str(files['train'])!r}")
        rows = split_rows(files, split, len(table), test, table.ids)
        has_ids = table.ids is not None
        header = Header("rows", (len(train.columns),), train.classes, columns=train.columns, has_ids=has_ids)
        write_store(unfinished, header, table.blocks(rows, train.classes))

    return cached(target, build, set(files.values())).as_split()


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
    """The rows of one parquet or CSV file, checked; the column ``id`` is by default the one that the file notes.

    Rows to predict need no labels: with ``wanted``, the columns of training (if empty, all), other columns are ignored.
    """

    def __init__(self, file: Place, label: str, id: str = "", *, wanted: Sequence[str] | None = None):
        self.file = file
        self.label = label
        self._vectors = VectorColumns(file) if file.suffix == ".parquet" else None
        self._widths = self._vectors.widths if self._vectors else {}
        self._table = read_parquet(file, self._vectors.others) if self._vectors else _read_csv(file)
        notes = _Notes()
        if self._vectors:
            with noted(self._vectors.schema, NOTES, file) as metadata:
                notes = _Notes.model_validate_json(metadata)
        id = id or notes.id
        if wanted is not None:
            notes.classes = None
            if label in self._table.column_names:
                self._table = self._table.drop_columns(label)
            self._table = self._table.append_column(label, pa.array(["unknown"] * self._table.num_rows))
            id = id if id in self._table.column_names else ""
        self._noted_classes = notes.classes
        names = self._table.column_names
        if label not in names:
            raise unknown(f"label column of {str(file)!r}", label, names)
        if id and id not in names:
            raise unknown(f"id column of {str(file)!r}", id, names)
        others = [label, id] if id else [label]  # a feature column may have an empty name, too
        self._numbers = [name for name in names if name not in others]
        elements = [f"{name}[{i}]" for name, width in self._widths.items() for i in range(width)]
        if wanted:
            if lost := next((name for name in wanted if name not in (*self._numbers, *elements)), None):
                raise unknown(f"column of {str(file)!r}", lost, [*self._numbers, *elements])
            self._numbers = [name for name in self._numbers if name in wanted]
        self.columns = (*self._numbers, *elements)  # a name for each number of a row
        if not self._table.num_rows or not self.columns:
            sizes = f"{self._table.num_rows} rows and {len(self.columns)} columns besides {label!r}"
            raise UserError(f"table {str(file)!r} has {sizes}, needed is one of each at least")
        self._check_label(self._table[label])
        self.ids: np.ndarray | None = None  # [n]
        if id:
            ids = self._table[id]
            self._refuse_where(ids.is_null(), id, "has no value")
            if not pa.types.is_integer(ids.type):
                raise UserError(f"id column {id!r} of {str(file)!r} is {ids.type}, needed are integers")
            self.ids = ids.to_numpy()
            outside = pa.chunked_array([(self.ids < 0) | (self.ids > LARGEST_ID)])
            self._refuse_where(outside, id, "holds a number that is not from 0 to 2⁶³ − 1")
        for name in self._numbers:
            self._check_column(name, self._table[name])

    def __len__(self) -> int:
        return self._table.num_rows

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes noted in the file, else the sorted values of the label column."""
        if self._noted_classes:
            return self._noted_classes
        values = pc.unique(self._table[self.label]).to_pylist()
        return tuple(map(str, sorted(values)))

    def blocks(self, rows: np.ndarray, classes: tuple[str, ...]) -> Iterator[Block]:
        """Yield ascending rows in blocks, labels as numbers of their classes."""
        size = BLOCK
        if self._widths:
            size = max(1, min(BLOCK, BLOCK_BYTES // (4 * sum(self._widths.values()))))
        for chunk in np.split(rows, range(size, len(rows), size)):
            block = self._table.take(chunk)
            with np.errstate(over="ignore"):  # overflows to infinity, refused below
                parts = [block[name].to_numpy().astype(np.float32)[:, None] for name in self._numbers]
                if self._vectors and self._widths:
                    vectors = self._vectors.take(chunk)
                    parts += [vectors[name].astype(np.float32, copy=False) for name in self._widths]
            x = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)  # [m, D]
            broken = np.argwhere(~np.isfinite(x))
            if len(broken):
                first, column = broken[0]
                row = int(chunk[first])
                name = self.columns[column]
                value = self._table[name][row].as_py() if name in self._numbers else x[first, column]
                shown = "NaN" if math.isnan(value) else value
                where = f"column {name!r} of {str(self.file)!r} holds {shown} in {self._place(row)}"
                raise UserError(f"{where}, needed are finite numbers that float32 can hold")
            labels = [str(value) for value in block[self.label].to_pylist()]
            ids = None if self.ids is None else self.ids[chunk].astype(np.int64)
            yield Block(x, class_numbers(labels, classes), sample=x, ids=ids)

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

    def _check_column(self, name: str, column: pa.ChunkedArray) -> None:
        self._refuse_where(column.is_null(), name, "has no value")
        integers = pa.types.is_integer(column.type)
        if not integers and not pa.types.is_floating(column.type):
            raise UserError(f"column {name!r} of {str(self.file)!r} is {column.type}, needed are numbers")
        if not integers or column.type.bit_width <= 16:
            return
        # float32 would round large integers, and different values, such as two identifiers, would become one.
        values = column.to_numpy()
        lowest = values & -values  # the lowest set bit
        odd = values // np.where(values == 0, 1, lowest)  # the part that the 24 bits of a float32 must hold
        rounded = values[np.abs(odd) > 1 << 24]
        if len(rounded):
            where = f"column {name!r} of {str(self.file)!r}"
            raise UserError(f"{where} holds {rounded[0]}, which float32 rounds: leave it out or scale it")

    def _refuse_where(self, wrong: pa.ChunkedArray, name: str, problem: str) -> None:
        row = pc.index(wrong, True).as_py()
        if row >= 0:
            raise UserError(f"column {name!r} of {str(self.file)!r} {problem} in {self._place(row)}")

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


class VectorColumns:
    """The columns of vectors in a parquet file, read one row group at a time: together they may exceed memory."""

    def __init__(self, file: Place):
        self._place = file
        with reading(file):
            self._file = pq.ParquetFile(open_input(file))
            self.schema = self._file.schema_arrow
            groups = range(self._file.num_row_groups)
            sizes = [self._file.metadata.row_group(group).num_rows for group in groups]
        check_distinct(self.schema.names, file)
        self.others: list[str] = []  # names of all other columns
        self.widths: dict[str, int] = {}  # length of the vectors of each column, in the order of the file
        for field in self.schema:
            kind = field.type
            if not pa.types.is_fixed_size_list(kind):
                self.others.append(field.name)
                continue
            if not pa.types.is_floating(kind.value_type) or not kind.list_size:
                where = f"column {field.name!r} of {str(file)!r}"
                raise UserError(f"{where} is {kind}, needed are numbers, or lists of floats of one size")
            self.widths[field.name] = kind.list_size
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._starts = np.concatenate([[0], self._ends[:-1]])
        self._group = lru_cache(1)(self._read_group)  # the next rows may be in it too

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return the vectors of one or more ascending rows, float [m, D], by column."""
        first, last = np.searchsorted(self._ends, [rows[0], rows[-1]], side="right")
        pieces: dict[str, list[np.ndarray]] = {name: [] for name in self.widths}
        for group in range(first, last + 1):
            begin, end = np.searchsorted(rows, [self._starts[group], self._ends[group]])
            local = rows[begin:end] - self._starts[group]
            for name, vectors in self._group(group).items():
                pieces[name].append(vectors[local])
        return {name: np.concatenate(parts) for name, parts in pieces.items()}

    def _read_group(self, group: int) -> dict[str, np.ndarray]:
        with reading(self._place):
            check_parquet(self._place, self._file.metadata, [group], self.widths)
            table = self._file.read_row_group(group, columns=list(self.widths))
            table.validate()
        vectors = {}
        for name, width in self.widths.items():
            column = table[name].combine_chunks()
            values = column.flatten()
            if column.null_count or values.null_count:
                where = f"rows {self._starts[group]} to {self._ends[group] - 1}"
                raise UserError(f"column {name!r} of {str(self._place)!r} has no value somewhere in {where}")
            vectors[name] = values.to_numpy().reshape(-1, width)
        return vectors

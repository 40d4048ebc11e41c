"""Tables: parquet or CSV files with numeric columns and a label."""

import math
from collections.abc import Iterator
from io import TextIOWrapper
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
from pydantic import Field

from raypkg.core.errors import UserError, unknown
from raypkg.data.files import Place, open_input, place_of
from raypkg.data.split import Split
from raypkg.data.store.cache import Cache, Target, cached, fingerprint, store_path, write_store
from raypkg.data.store.rows import check_distinct, class_numbers, reading, row_files, split_rows
from raypkg.data.store.stored import Block, Header
from raypkg.data.store.vectors import Notes, VectorColumns

from . import dataset

SUFFIXES = (".parquet", ".csv")
BLOCK = 1 << 16  # rows converted at once
LARGEST_ID = 2**63 - 1
BLOCK_BYTES = 64 << 20  # of vectors that are converted at once
NAN = {"NaN", "-NaN", "nan", "-nan"}  # a number that is refused as such, where Arrow would see no value
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
    column ``id``, where it is named here or by the file itself, as those of `effray embed` do, is no part of a sample:
    it says which samples of other data the rows stand for.

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
        header = Header("rows", (len(train.columns),), train.classes, columns=train.columns, has_ids=table.has_ids)
        write_store(unfinished, header, table.blocks(rows, train.classes))

    return cached(target, build, set(files.values())).as_split()


class RowTable:
    """One file's rows.

    Args:
        file: parquet or CSV.
        label: name of the column of labels.
        id: name of the column of ids; empty = the one that the file itself names, if it does.

    Raises:
        UserError: unreadable, without rows or columns, columns of one name, a missing value, labels that are no names
            of classes, ids that are no integers, or a column that is no number.
    """

    def __init__(self, file: Place, label: str, id: str = ""):
        self.file = file
        self.label = label
        self._vectors = VectorColumns(file) if file.suffix == ".parquet" else None
        self._notes = self._vectors.notes if self._vectors else Notes()
        self._id = id or self._notes.id
        self._widths = self._vectors.widths if self._vectors else {}
        self._table = _read(file, self._vectors)
        names = self._table.column_names
        if label not in names:
            raise unknown(f"label column of {str(file)!r}", label, names)
        if self._id and self._id not in names:
            raise unknown(f"id column of {str(file)!r}", self._id, names)
        others = [label, self._id] if self._id else [label]  # a column may have no name, too
        self._numbers = [name for name in names if name not in others]
        if not self._table.num_rows or not self.columns:
            raise UserError(
                f"table {str(file)!r} has {self._table.num_rows} rows and {len(self.columns)} columns besides"
                f" {label!r}, needed is one of each at least"
            )
        self._check_label(self._table[label])
        if self._id:
            self._check_ids(self._table[self._id])
        for name in self._numbers:
            self._check_column(name, self._table[name])

    def __len__(self) -> int:
        return self._table.num_rows

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of numbers, then of each number of the columns of vectors."""
        parts = [f"{name}[{number}]" for name, width in self._widths.items() for number in range(width)]
        return (*self._numbers, *parts)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that the file itself names, else the sorted values of the label column."""
        if self._notes.classes:
            return self._notes.classes
        values = pc.unique(self._table[self.label]).to_pylist()
        return tuple(map(str, sorted(values)))

    @property
    def ids(self) -> np.ndarray | None:
        """Which samples of other data the rows stand for, [n]; None where no column says it."""
        return self._table[self._id].to_numpy() if self.has_ids else None

    @property
    def has_ids(self) -> bool:
        """Whether a column says which samples the rows stand for."""
        return bool(self._id)

    def blocks(self, rows: np.ndarray, classes: tuple[str, ...]) -> Iterator[Block]:
        """Yield ascending rows in blocks, labels as numbers of their classes."""
        size = BLOCK
        if self._widths:
            size = max(1, min(BLOCK, BLOCK_BYTES // (4 * sum(self._widths.values()))))
        for chunk in np.split(rows, range(size, len(rows), size)):
            block = self._table.take(chunk)
            x = self._features(block, chunk)
            self._check_finite(x, chunk)
            labels = [str(value) for value in block[self.label].to_pylist()]
            ids = block[self._id].to_numpy().astype(np.int64) if self.has_ids else None
            yield Block(x, class_numbers(labels, classes), sample=x, ids=ids)

    def _features(self, block: pa.Table, rows: np.ndarray) -> np.ndarray:
        """Return what a block's columns hold, float32 [m, D]."""
        with np.errstate(over="ignore"):  # becomes infinity, which is refused
            parts = [block[name].to_numpy().astype(np.float32)[:, None] for name in self._numbers]
            if self._vectors and self._widths:
                vectors = self._vectors.take(rows)
                parts += [vectors[name].astype(np.float32, copy=False) for name in self._widths]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _check_label(self, labels: pa.ChunkedArray) -> None:
        self._refuse_where(labels.is_null(), self.label, "has no value")
        kind = labels.type
        if pa.types.is_nested(kind) or pa.types.is_binary(kind):
            raise UserError(
                f"label column {self.label!r} of {str(self.file)!r} is {kind}, needed are numbers or texts in UTF-8"
            )
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            self._refuse_where(pc.equal(labels, ""), self.label, "has no value")
            self._refuse_where(pc.match_substring(labels, "\n"), self.label, "holds a line break")  # an open quote
        if pa.types.is_floating(kind):
            self._refuse_where(pc.invert(pc.is_finite(labels)), self.label, "holds NaN or infinity")

    def _check_ids(self, ids: pa.ChunkedArray) -> None:
        self._refuse_where(ids.is_null(), self._id, "has no value")
        if not pa.types.is_integer(ids.type):
            raise UserError(f"id column {self._id!r} of {str(self.file)!r} is {ids.type}, needed are integers")
        values = ids.to_numpy()
        wrong = (values < 0) | (values > LARGEST_ID)
        self._refuse_where(pa.chunked_array([wrong]), self._id, "holds a number that is not from 0 to 2⁶³ − 1")

    def _check_column(self, name: str, column: pa.ChunkedArray) -> None:
        self._refuse_where(column.is_null(), name, "has no value")
        integers = pa.types.is_integer(column.type)
        if not integers and not pa.types.is_floating(column.type):
            raise UserError(f"column {name!r} of {str(self.file)!r} is {column.type}, needed are numbers")
        if integers and column.type.bit_width > 16:
            self._check_exact(name, column.to_numpy())

    def _refuse_where(self, wrong: pa.ChunkedArray, name: str, problem: str) -> None:
        row = pc.index(wrong, True).as_py()
        if row >= 0:
            raise UserError(f"column {name!r} of {str(self.file)!r} {problem} in {self._place(row)}")

    def _check_exact(self, name: str, values: np.ndarray) -> None:
        """Refuse integers that float32 rounds: different values, such as two identifiers, would become one."""
        lowest = values & -values  # the lowest bit that is set
        odd = values // np.where(values == 0, 1, lowest)  # what its 24 bits must hold
        rounded = values[np.abs(odd) > 1 << 24]
        if len(rounded):
            raise UserError(
                f"column {name!r} of {str(self.file)!r} holds {rounded[0]}, which float32 rounds: leave it"
                " out or scale it"
            )

    def _check_finite(self, x: np.ndarray, rows: np.ndarray) -> None:
        broken = np.argwhere(~np.isfinite(x))
        if len(broken):
            first, column = broken[0]
            row = int(rows[first])
            name = self.columns[column]
            value = self._table[name][row].as_py() if name in self._numbers else x[first, column]
            shown = "NaN" if math.isnan(value) else value
            raise UserError(
                f"column {name!r} of {str(self.file)!r} holds {shown} in {self._place(row)}, needed are finite numbers"
                " that float32 can hold"
            )

    def _place(self, row: int) -> str:
        """Tell the user where a row stands: a line of a CSV file as editors count, a row of parquet from 0."""
        return f"row {row}" if self.file.suffix == ".parquet" else f"line {_line(self.file, row)}"


def _read(file: Place, vectors: VectorColumns | None) -> pa.Table:
    """Return a file's table, without its columns of vectors."""
    with reading(file):
        if vectors:
            table = pq.ParquetFile(open_input(file)).read(vectors.others)
            table.validate(full=True)  # texts are UTF-8
        else:
            table = pcsv.read_csv(open_input(file), convert_options=CONVERT)
        check_distinct(table.column_names, file)
        return table.cast(pa.schema(map(_plain, table.schema)))


def _plain(column: pa.Field) -> pa.Field:
    """Return a column of views of texts as one of texts, of which Arrow can take rows."""
    return column.with_type(pa.string()) if pa.types.is_string_view(column.type) else column


def _line(file: Place, row: int) -> int:
    """Return the line, from 1, on which a row of a CSV file stands; Arrow skips empty lines."""
    with TextIOWrapper(open_input(file), encoding="utf-8", errors="replace") as lines:
        filled = [number for number, line in enumerate(lines, 1) if line != "\n"]
    _header, *numbers = filled
    return numbers[row]

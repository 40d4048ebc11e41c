"""Tables: parquet or CSV files with numeric columns and a label."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
from pydantic import Field

from raypkg.core.errors import UserError, unknown
from raypkg.data.split import Split
from raypkg.data.store.arrow import Block, Header, write
from raypkg.data.store.cache import cached, fingerprint, store_path
from raypkg.data.store.rows import class_numbers, row_files, split_rows

from . import dataset

SUFFIXES = (".parquet", ".csv")
BLOCK = 1 << 16  # rows converted at once


@dataset("table")
def load(
    root: str,
    *,
    split: str,
    cache: Path | None,
    label: str = "label",
    test: Annotated[float, Field(ge=0, lt=1)] = 0.2,
) -> Split:
    """Parquet or CSV of numeric columns and a column of labels: PATH/train.csv and PATH/test.csv, or one file.

    Of one file, the share ``test`` is the test split, drawn by its length alone. Labels are numbers or texts; their
    sorted values are the classes. Columns become float32.

    Raises:
        UserError: missing or unreadable files, columns that are no numbers, missing values, classes unknown to train.
    """
    files = row_files(root, SUFFIXES)
    key = fingerprint(files.values(), label=label, test=test)
    target = store_path(cache, Path(root).resolve().stem, key, split)

    def build(unfinished: Path) -> None:
        train = RowTable(files["train"], label)
        table = train if split == "train" else RowTable(files[split], label)
        if table.columns != train.columns:
            raise UserError(f"the columns of {str(files[split])!r} are not those of {str(files['train'])!r}")
        rows = split_rows(files, split, len(table), test)
        header = Header("rows", (len(train.columns),), train.classes, columns=train.columns)
        write(unfinished, header, table.blocks(rows, train.classes))

    return cached(target, build).as_split()


class RowTable:
    """One file's rows.

    Args:
        file: parquet or CSV.
        label: name of the column of labels.

    Raises:
        UserError: unreadable, without rows or columns, a missing value, or a column that is no number.
    """

    def __init__(self, file: Path, label: str):
        self.file = file
        self.label = label
        try:
            self._table = pq.read_table(file) if file.suffix == ".parquet" else pcsv.read_csv(file)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"table {str(file)!r} cannot be read: {error}") from None
        if label not in self._table.column_names:
            raise unknown(f"label column of {str(file)!r}", label, self._table.column_names)
        if not self._table.num_rows or not self.columns:
            raise UserError(f"table {str(file)!r} has {self._table.num_rows} rows and {len(self.columns)} columns")
        for name in self._table.column_names:
            self._check(name, self._table[name])

    def __len__(self) -> int:
        return self._table.num_rows

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns but the label's."""
        return tuple(name for name in self._table.column_names if name != self.label)

    @property
    def classes(self) -> tuple[str, ...]:
        """The sorted values of the label column."""
        values = pc.unique(self._table[self.label]).sort()
        return tuple(map(str, values.to_pylist()))

    def blocks(self, rows: np.ndarray, classes: tuple[str, ...]) -> Iterator[Block]:
        """Yield rows in blocks, labels as numbers of their classes."""
        for chunk in np.split(rows, range(BLOCK, len(rows), BLOCK)):
            block = self._table.take(chunk)
            columns = [block[name].to_numpy().astype(np.float32) for name in self.columns]
            x = np.stack(columns, axis=1)  # [m, D]
            self._check_finite(x, chunk)
            labels = [str(value) for value in block[self.label].to_pylist()]
            yield Block(x, class_numbers(labels, classes), sample=x)

    def _check(self, name: str, column: pa.ChunkedArray) -> None:
        if column.null_count:
            row = pc.index(column.is_null(), True).as_py()
            raise UserError(f"column {name!r} of {str(self.file)!r} has no value in row {row}")
        if name == self.label:
            return
        integers = pa.types.is_integer(column.type)
        if not integers and not pa.types.is_floating(column.type):
            raise UserError(f"column {name!r} of {str(self.file)!r} is {column.type}, needed are numbers")
        if integers and column.type.bit_width > 16:
            self._check_exact(name, column.to_numpy())

    def _check_exact(self, name: str, values: np.ndarray) -> None:
        """Refuse integers that float32 rounds: different values, such as two identifiers, would become one."""
        stored = values.astype(np.float32)
        rounded = values[stored.astype(np.float64) != values.astype(np.float64)]
        if len(rounded):
            raise UserError(
                f"column {name!r} of {str(self.file)!r} holds {rounded[0]}, which float32 rounds: leave it"
                " out or scale it"
            )

    def _check_finite(self, x: np.ndarray, rows: np.ndarray) -> None:
        broken = np.argwhere(~np.isfinite(x))
        if len(broken):
            row, column = broken[0]
            name = self.columns[column]
            raise UserError(f"column {name!r} of {str(self.file)!r} holds NaN or infinity in row {rows[row]}")

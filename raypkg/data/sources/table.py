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
from raypkg.data.store.cache import cache_folder, cached, fingerprint
from raypkg.data.store.rows import held_out, row_files

from . import dataset

SUFFIXES = (".parquet", ".csv")
BLOCK = 1 << 16  # rows converted at once


@dataset("table")
def load(
    root: str, *, split: str, cache: Path | None, label: str = "label", test: Annotated[float, Field(ge=0, lt=1)] = 0.2
) -> Split:
    """Parquet or CSV of numeric columns and a column of labels: PATH/train.csv and PATH/test.csv, or one file.

    Of one file, the share ``test`` is the test split, drawn by its length alone. Labels are numbers or texts; their
    sorted values are the classes. Columns become float32.

    Raises:
        UserError: missing or unreadable files, columns that are no numbers, missing values, classes unknown to train.
    """
    path, files = Path(root), row_files(root, SUFFIXES)
    key = fingerprint(files.values(), label=label, test=test)
    target = cache_folder(cache) / f"{path.resolve().stem}-{split}-{key}.arrow"

    def build(unfinished: Path) -> None:
        train = RowTable(files["train"], label)
        classes, columns = train.classes, train.columns
        table = train if split == "train" else RowTable(files[split], label)
        if table.columns != columns:
            raise UserError(f"the columns of {str(files[split])!r} are not those of {str(files['train'])!r}")
        rows = held_out(len(table), test, split, path) if path.is_file() else np.arange(len(table))
        header = Header("rows", (len(columns),), classes, columns=columns)
        write(unfinished, header, table.blocks(rows, classes))

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
        self.file, self.label = file, label
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
        return tuple(map(str, pc.unique(self._table[self.label]).sort().to_pylist()))

    def blocks(self, rows: np.ndarray, classes: tuple[str, ...]) -> Iterator[Block]:
        """Yield rows in blocks, labels as numbers of their classes."""
        place = {name: number for number, name in enumerate(classes)}
        for part in np.split(rows, range(BLOCK, len(rows), BLOCK)):
            some = self._table.take(part)
            x = np.stack([some[name].to_numpy().astype(np.float32) for name in self.columns], 1)
            self._check_finite(x, part)
            yield Block(x, np.array([self._number(place, str(value)) for value in some[self.label].to_pylist()]), x)

    def _number(self, place: dict[str, int], value: str) -> int:
        if value not in place:
            raise unknown(f"class in {str(self.file)!r}", value, place)
        return place[value]

    def _check(self, name: str, column: pa.ChunkedArray) -> None:
        if column.null_count:
            row = pc.index(column.is_null(), True).as_py()
            raise UserError(f"column {name!r} of {str(self.file)!r} has no value in row {row}")
        if name != self.label and not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            raise UserError(f"column {name!r} of {str(self.file)!r} is {column.type}, needed are numbers")
        if name != self.label and pa.types.is_integer(column.type) and column.type.bit_width > 16:
            values = column.to_numpy()
            rounded = np.flatnonzero(values.astype(np.float32).astype(np.float64) != values.astype(np.float64))
            if len(rounded):
                raise UserError(
                    f"column {name!r} of {str(self.file)!r} holds {values[rounded[0]]}, which float32 rounds: leave it"
                    " out or scale it"
                )

    def _check_finite(self, x: np.ndarray, rows: np.ndarray) -> None:
        bad = np.argwhere(~np.isfinite(x))
        if len(bad):
            row, column = rows[bad[0][0]], self.columns[bad[0][1]]
            raise UserError(f"column {column!r} of {str(self.file)!r} holds NaN or infinity in row {row}")

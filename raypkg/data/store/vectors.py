"""Columns of parquet files that hold a vector in every row, such as the features of a frozen model.

A file may say in its schema's metadata, under the key ``effray``, which column has the samples' ids and what the
classes are, in their order: where it does, nobody need name them.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypkg.core.errors import UserError
from raypkg.data.files import Place, open_input

from .rows import check_distinct, reading

ID = "id"
LABEL = "label"
FEATURES = "features"
KEY = b"effray"


class Notes(NamedTuple):
    """What the metadata of a file say of its rows.

    Attributes:
        id: the column of ids; empty where there is none.
        classes: their names in order; none where they are the values of the label column.
    """

    id: str = ""
    classes: tuple[str, ...] = ()

    @classmethod
    def of(cls, schema: pa.Schema) -> "Notes":
        """Read the notes of a schema; those of another kind, or of somebody else, count as none."""
        metadata = schema.metadata or {}
        try:
            facts = json.loads(metadata.get(KEY, b"{}"))
            return cls(str(facts.get("id", "")), tuple(map(str, facts.get("classes", ()))))
        except (ValueError, AttributeError, TypeError, RecursionError):
            return cls()


def features_schema(width: int, classes: Sequence[str]) -> pa.Schema:
    """Return the schema of samples as an id, a label and a vector each.

    Args:
        width: D, the length of the vectors.
        classes: the names of all classes, in their order.
    """
    number = pa.field("element", pa.float32(), nullable=False)  # without a bit for each that says so, twice as fast
    notes = {"id": ID, "classes": list(classes)}
    fields = [
        pa.field(ID, pa.int64(), nullable=False),
        pa.field(LABEL, pa.string(), nullable=False),
        pa.field(FEATURES, pa.list_(number, width), nullable=False),
    ]
    return pa.schema(fields, {KEY: json.dumps(notes)})


class VectorColumns:
    """The columns of vectors in a file, read a row group at a time: together they may be larger than memory.

    Args:
        file: parquet.

    Attributes:
        notes: what the file's metadata say of its rows.
        widths: length of the vectors, by the names of the columns in the order of the file.
        others: the names of all other columns.

    Raises:
        UserError: unreadable, columns of one name, or vectors of something else than floats.
    """

    def __init__(self, file: Place):
        self._place = file
        with reading(file):
            self._file = pq.ParquetFile(open_input(file))
            schema = self._file.schema_arrow
            groups = range(self._file.num_row_groups)
            sizes = [self._file.metadata.row_group(group).num_rows for group in groups]
        check_distinct(schema.names, file)
        self.notes = Notes.of(schema)
        self.others = [field.name for field in schema if not pa.types.is_fixed_size_list(field.type)]
        vectors = [field for field in schema if pa.types.is_fixed_size_list(field.type)]
        for field in vectors:
            self._check_floats(field)
        self.widths = {field.name: field.type.list_size for field in vectors}
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._starts = np.concatenate([[0], self._ends[:-1]])
        self._latest: tuple[int, dict[str, np.ndarray]] = (-1, {})

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return the vectors of one or more ascending rows, float [m, D], by the names of their columns.

        Raises:
            UserError: the file is damaged, or one has no value.
        """
        first, last = np.searchsorted(self._ends, [rows[0], rows[-1]], side="right")
        without_gaps = rows[-1] - rows[0] == len(rows) - 1
        pieces: dict[str, list[np.ndarray]] = {name: [] for name in self.widths}
        for group in range(first, last + 1):
            begin, end = np.searchsorted(rows, [self._starts[group], self._ends[group]])
            local = rows[begin:end] - self._starts[group]
            for name, vectors in self._group(group).items():
                piece = vectors[local[0] : local[-1] + 1] if without_gaps and len(local) else vectors[local]
                pieces[name].append(piece)
        return {name: np.concatenate(parts) for name, parts in pieces.items()}

    def _group(self, group: int) -> dict[str, np.ndarray]:
        """Return the vectors of a row group; the latest is kept, as the next rows may lie in it too."""
        if self._latest[0] != group:
            with reading(self._place):
                table = self._file.read_row_group(group, columns=list(self.widths))
                table.validate()
            self._latest = (group, {name: self._vectors(table, group, name) for name in self.widths})
        return self._latest[1]

    def _vectors(self, table: pa.Table, group: int, name: str) -> np.ndarray:
        column = table[name].combine_chunks()
        values = column.flatten()
        if column.null_count or values.null_count:
            where = f"rows {self._starts[group]} to {self._ends[group] - 1}"
            raise UserError(f"column {name!r} of {str(self._place)!r} has no value somewhere in {where}")
        return values.to_numpy().reshape(-1, self.widths[name])

    def _check_floats(self, field: pa.Field) -> None:
        if not pa.types.is_floating(field.type.value_type) or not field.type.list_size:
            raise UserError(
                f"column {field.name!r} of {str(self._place)!r} is {field.type}, needed are numbers, or lists of floats"
                " of one size"
            )

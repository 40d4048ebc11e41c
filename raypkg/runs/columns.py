"""Columns of a run's tables, read with care: a file may be another one's, or be damaged."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from raypkg.core.errors import UserError

IDENTITY = ("phase", "main", "model", "epoch")  # of a row of metrics; its other columns are figures


def column_of(table: pa.Table, name: str, path: str, fits: Callable[[pa.DataType], bool]) -> np.ndarray:
    """Return a column of numbers.

    Args:
        table: with the column.
        name: of the column.
        path: names the file in the error.
        fits: says whether a type is right.

    Raises:
        UserError: the column is missing, of another type, or has nulls.
    """
    if name not in table.column_names:
        raise UserError(f"{path} has no column {name}: it has {', '.join(table.column_names)}")
    values = table[name]
    nulls = values.null_count
    if not fits(values.type) or nulls:
        kind = f"{values.type} with {nulls} nulls" if nulls else values.type
        raise UserError(f"{path}: column {name} is {kind}, which it cannot be")
    return values.to_numpy()


def is_number(kind: pa.DataType) -> bool:
    """Say whether a type is of integers or floats."""
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def metric_rows(table: pa.Table, path: str) -> list[dict[str, Any]]:
    """Return the rows of a table of metrics; ``path`` names it in the error.

    Raises:
        UserError: it has no phases and epochs, or figures that are no numbers.
    """
    column_of(table, "phase", path, pa.types.is_string)
    column_of(table, "epoch", path, pa.types.is_integer)
    for name in table.column_names:
        kind = table[name].type
        if name not in IDENTITY and not (is_number(kind) or pa.types.is_null(kind)):
            raise UserError(f"{path}: column {name} is {kind}, which it cannot be")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows

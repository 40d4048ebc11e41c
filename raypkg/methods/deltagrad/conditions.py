"""Samples by what is known of them: ``label = 7 and column3 > 0.5``."""

import operator
import re

import numpy as np

from raypkg.core.errors import UserError, unknown
from raypkg.data.split import Split

OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
CLAUSE = re.compile(r"\s*(.+?)\s*(<=|>=|!=|=|<|>)\s*(.+?)\s*")
BLOCK = 1 << 16  # rows read at once


def matching(split: Split, condition: str) -> np.ndarray:
    """Return the positions of the samples that meet all clauses ``NAME OPERATOR VALUE``, joined by ``and``.

    NAME is a column of a table, or else ``label`` (with = and !=, VALUE is a class name).

    Raises:
        UserError: malformed, an unknown name or class, or a value that is no number.

    >>> import torch
    >>> split = Split.from_tensors(torch.eye(3), torch.tensor([0, 1, 1]), classes=("cat", "dog"))
    >>> matching(split, "label = dog")
    array([1, 2])
    """
    kept = np.ones(len(split), bool)
    for clause in re.split(r"(?i)\s+and\s+", condition):
        parsed = CLAUSE.fullmatch(clause)
        if not parsed:
            example = f"label = {split.classes[0]}"
            raise UserError(f"condition {clause!r} is not of the form NAME OPERATOR VALUE, such as {example}")
        name, comparison, value = parsed.groups()
        if name == "label" and name not in split.columns:
            kept &= _by_label(split, comparison, value)
        else:
            kept &= _by_column(split, name, comparison, value)
    return np.flatnonzero(kept)


def _by_label(split: Split, comparison: str, value: str) -> np.ndarray:
    if comparison not in ("=", "!="):
        raise UserError(f"condition label {comparison} {value}: labels compare with = and != only")
    if value not in split.classes:
        raise unknown("class", value, split.classes)
    number = split.classes.index(value)
    return OPERATORS[comparison](split.y.numpy(), number)


def _by_column(split: Split, name: str, comparison: str, value: str) -> np.ndarray:
    if name not in split.columns:
        raise unknown("name in a condition", name, ("label", *split.columns))
    try:
        number = np.float32(float(value))  # as the column is stored, so that = finds what the file says
    except ValueError:
        raise UserError(f"condition {name} {comparison} {value}: {value!r} is no number") from None
    column = split.columns.index(name)
    met = []
    for start in range(0, len(split), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(split)))
        values = split.take(rows)[:, column]
        met.append(OPERATORS[comparison](values, number))
    return np.concatenate(met)

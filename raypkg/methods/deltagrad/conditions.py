"""Samples by what is known of them: ``label = 7 and column3 > 0.5``."""

import operator
import re
from reprlib import repr as shortened

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
AND = re.compile(r"(?<!\s)\s+and\s+", re.IGNORECASE)  # without what is looked behind for, spaces cost their square
COMPARISON = re.compile("|".join(OPERATORS))
BLOCK = 1 << 16  # rows read at once
LONGEST = 100  # signs of a name that an error shows


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
    for clause in AND.split(condition):
        name, comparison, value = _parsed(clause, split)
        if name == "label" and name not in split.columns:
            kept &= _by_label(split, comparison, value)
        else:
            kept &= _by_column(split, name, comparison, value)
    return np.flatnonzero(kept)


def _parsed(clause: str, split: Split) -> tuple[str, str, str]:
    """Return name, operator and value of a clause; the first operator in it counts."""
    comparison = COMPARISON.search(clause)
    if comparison:
        name = clause[: comparison.start()].strip()
        value = clause[comparison.end() :].strip()
        if name and value:
            return name, comparison[0], value
    example = f"label = {split.classes[0]}"
    raise UserError(f"condition {shortened(clause)} is not of the form NAME OPERATOR VALUE, such as {example}")


def _by_label(split: Split, comparison: str, value: str) -> np.ndarray:
    if comparison not in ("=", "!="):
        raise UserError(f"condition label {comparison} {shortened(value)}: labels compare with = and != only")
    if value not in split.classes:
        raise unknown("class", value[:LONGEST], split.classes)
    number = split.classes.index(value)
    return OPERATORS[comparison](split.y.numpy(), number)


def _by_column(split: Split, name: str, comparison: str, value: str) -> np.ndarray:
    if name not in split.columns:
        raise unknown("name in a condition", name[:LONGEST], ("label", *split.columns))
    number = _number(value, f"condition {name} {comparison} {shortened(value)}")
    column = split.columns.index(name)
    met = []
    for start in range(0, len(split), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(split)))
        values = split.take(rows)[:, column]
        met.append(OPERATORS[comparison](values, number))
    return np.concatenate(met)


def _number(value: str, where: str) -> np.float32:
    """Return a value in the type in which columns are stored, so that = finds what the file says."""
    try:
        number = float(value)
    except ValueError:
        raise UserError(f"{where}: this is no number") from None
    largest = float(np.finfo(np.float32).max)
    if not abs(number) <= largest:  # nan too
        raise UserError(f"{where}: numbers are finite and at most {largest:.3g}, as columns hold them")
    return np.float32(number)

"""Ids of samples as a user gives them, ``3,14,15``, a file of them, or a list in JSON, and what they stand for."""

import os
import re
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from raypkg.core.errors import UserError, unknown
from raypkg.data.split import Split

LIST = re.compile(r"[0-9]+(,[0-9]+)*")  # \d would take the digits of every script
DIGITS = re.compile(r"[0-9]{1,19}")  # as many as the largest id has
COLUMNS = ("id", "index")  # of a parquet file
ALLOWED = "ids are whole numbers from 0 to 2⁶³ − 1"
LONGEST = 100  # signs of a list that an error shows


class Found(NamedTuple):
    """Where the samples of some ids are.

    Attributes:
        positions: in the split, int64 [m]; an id has as many as samples stand for it.
        owner: which of the ids each belongs to, int64 [m].
        counts: positions of each id, int64 [ids]; 0 of one that is unknown.
    """

    positions: Tensor
    owner: Tensor
    counts: Tensor

    def among(self, mask: Tensor) -> Tensor:
        """Return how many of the positions of each id a mask [n] has, int64 [ids]."""
        chosen = self.owner[mask[self.positions]]
        return torch.bincount(chosen, minlength=len(self.counts))


def find_ids(split: Split, ids: Tensor) -> Found:
    """Return where the samples of ids are: those of other data where a split says so, else positions in it.

    >>> split = Split.from_tensors(torch.eye(3), torch.tensor([0, 1, 1]))
    >>> find_ids(split, torch.tensor([2, 7])).counts
    tensor([1, 0])
    """
    known = torch.arange(len(split)) if split.ids is None else split.ids
    ascending, order = known.sort(stable=True)
    first = torch.searchsorted(ascending, ids)
    end = torch.searchsorted(ascending, ids, right=True)
    counts = end - first
    owner = torch.arange(len(ids)).repeat_interleave(counts)
    before = counts.cumsum(0) - counts  # positions of the ids before each
    place = torch.arange(len(owner)) - before[owner]  # of a position among those of its id
    return Found(order[first[owner] + place], owner, counts)


def id_at(split: Split, position: int) -> int:
    """Return the id of the sample at a position."""
    return position if split.ids is None else int(split.ids[position])


def id_range(split: Split) -> str:
    """Tell the user which ids a split has.

    >>> id_range(Split.from_tensors(torch.eye(3), torch.tensor([0, 1, 1])))
    '0 … 2'
    """
    if split.ids is None:
        return f"0 … {len(split) - 1}"
    return f"those of the data's column of ids, {int(split.ids.min())} … {int(split.ids.max())}"


def is_id(value: Any) -> bool:
    """Say whether a value is an integer that can be a position; True is none."""
    return type(value) is int and 0 <= value < 2**63


def read_ids(text: str) -> list[int]:
    """Return ids given as ``3,14,15`` or in a file: one a line, or the column ``id`` or ``index`` of a parquet file.

    Raises:
        UserError: neither a list nor a file, unreadable, no such column, something else than ids, or none at all.

    >>> read_ids("3,14,15")
    [3, 14, 15]
    """
    if LIST.fullmatch(text) or not os.path.exists(text):
        where = f"ids {text[:LONGEST]!r} (no such file)"
        values: list[Any] = text.split(",")
    else:
        where = f"ids in {text!r}"
        values = _in_file(Path(text))
    if not values:
        raise UserError(f"{text!r} holds no ids")
    return [_id(value, where) for value in values]


def _in_file(file: Path) -> list[Any]:
    try:
        if file.suffix == ".parquet" and file.is_file():
            return _in_parquet(file)
        return file.read_text("utf-8-sig").split()
    except OSError as error:
        raise UserError(f"ids in {str(file)!r} cannot be read: {error.strerror or error}") from None
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"ids in {str(file)!r} cannot be read: {error}") from None


def _in_parquet(file: Path) -> list[Any]:
    names = pq.read_schema(file).names
    column = next((name for name in COLUMNS if name in names), None)
    if column is None:
        raise unknown(f"id column of {str(file)!r}", "id", names)
    if names.count(column) > 1:
        raise UserError(f"{str(file)!r} has {names.count(column)} columns {column!r}: which one holds the ids?")
    table = pq.read_table(file, columns=[column], partitioning=None)
    return table[column].to_pylist()


def _id(value: Any, where: str) -> int:
    number = int(value) if isinstance(value, str) and DIGITS.fullmatch(value) else value
    if not is_id(number):
        raise UserError(f"{where}: {shortened(value)} is no id; {ALLOWED}: 3,14,15, or a file of them, one a line")
    return number

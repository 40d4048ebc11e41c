"""Samples that join a data set: brought into its form, and numbered on from its end."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from raypkg.core.errors import UserError, unknown
from raypkg.data.split import Split, Take


def aligned(split: Split, like: Split) -> Split:
    """Return a split with the classes and statistics of another, whose samples it is to join.

    Raises:
        UserError: samples of another shape, other columns, or of a class that the other does not know.
    """
    if split.shape != like.shape:
        raise UserError(f"the new samples have shape {list(split.shape)}, the data set has {list(like.shape)}")
    if split.columns != like.columns:
        raise UserError(f"the new columns are {', '.join(split.columns)}; the data set's {', '.join(like.columns)}")
    strange = next((name for name in split.classes if name not in like.classes), None)
    if strange is not None:
        raise unknown("class of the new samples", strange, like.classes)
    numbers = torch.tensor([like.classes.index(name) for name in split.classes])  # [classes of split]
    return replace(like, take=split.take, y=numbers[split.y], ids=None)  # they get the next ids


def joined(*splits: Split) -> Split:
    """Return aligned splits as one, their samples one after another.

    Where the first has ids, those of the others are numbered on from the largest of them.
    """
    takes = [split.take for split in splits]
    starts = [0, *accumulate(map(len, splits))]  # where each split begins, and the end
    y = torch.cat([split.y for split in splits])
    ids = _numbered_on(splits[0].ids, len(y))
    return replace(splits[0], take=partial(_take_joined, takes, starts), y=y, ids=ids)


def _numbered_on(ids: Tensor | None, count: int) -> Tensor | None:
    """Return so many ids, the first of them as given."""
    if ids is None:
        return None
    begin = int(ids.max()) + 1
    further = torch.arange(begin, begin + count - len(ids))
    return torch.cat([ids, further])


def _take_joined(takes: Sequence[Take], starts: Sequence[int], indices: np.ndarray) -> np.ndarray:
    if not len(indices) or indices.max() < starts[1]:
        return takes[0](indices)
    owner = np.searchsorted(starts, indices, side="right") - 1  # [b], the split of each sample
    gathered = []
    for k in np.unique(owner):
        local = indices[owner == k] - starts[k]
        gathered.append(takes[k](local))
    grouped = np.concatenate(gathered)  # split after split
    out = np.empty_like(grouped)
    out[np.argsort(owner, kind="stable")] = grouped  # back to the order asked for
    return out

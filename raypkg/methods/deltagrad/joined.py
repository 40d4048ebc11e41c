"""Samples that join a data set, numbered on from its end."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from raypkg.data.split import Split, Take


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

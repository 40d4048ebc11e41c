"""Harder training data made from any data set: wrong labels, rare classes, near-duplicates. Pixels are never copied."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from raypkg.core.errors import UserError

from .blocks import Take
from .split import Split

LARGEST = 2**31  # samples, after repetition


def long_tail(y: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Return the positions of a long tail: class c keeps n_max · share^(c / (C − 1)) samples, as far as it has them.

    n_max is the size of the largest class; every class keeps at least one sample.

    Args:
        y: labels, int64 [n].
        share: of the largest class that the last one keeps, in (0, 1].
        rng: draws which samples stay.

    Returns:
        Ascending positions, int64.

    >>> y = torch.arange(3).repeat_interleave(100)
    >>> y[long_tail(y, 0.01, torch.Generator().manual_seed(0))].bincount().tolist()
    [100, 10, 1]
    """
    sizes = y.bincount()  # [C]
    falls = max(len(sizes) - 1, 1)
    order = torch.randperm(len(y), generator=rng)
    kept = []
    for label, size in enumerate(sizes.tolist()):
        wanted = max(1, round(int(sizes.max()) * share ** (label / falls)))
        members = order[y[order] == label]
        kept.append(members[: min(size, wanted)])
    return torch.cat(kept).sort().values


def with_wrong_labels(split: Split, share: float, rng: torch.Generator) -> Split:
    """Return the split with round(share · n) labels replaced by another class each, uniformly drawn.

    Its ``truth`` keeps the labels from before.

    Args:
        split: whose labels.
        share: of wrong ones.
        rng: draws which samples, and which classes.

    Raises:
        UserError: there is no other class.
    """
    classes = split.num_classes
    if classes < 2:
        raise UserError(f"dataset.noise = {share:g}: the data set has one class, so no label can be another")
    n = len(split)
    wrong = torch.randperm(n, generator=rng)[: round(share * n)]
    shift = torch.randint(1, classes, (len(wrong),), generator=rng)
    y = split.y.clone()
    y[wrong] = (y[wrong] + shift) % classes
    return replace(split, y=y, truth=split.y)


def repeated_positions(n: int, times: int) -> Tensor:
    """Return every position ``times`` times in a row; with augmentation, each copy is drawn as another image.

    >>> repeated_positions(2, 3)
    tensor([0, 0, 0, 1, 1, 1])

    Raises:
        UserError: that would be more samples than can be numbered in memory.
    """
    if n * times > LARGEST:
        raise UserError(f"dataset.repeat = {times} of {n:,} samples: at most {LARGEST:,} in all")
    return torch.arange(n).repeat_interleave(times)


def taken(split: Split, positions: Tensor) -> Split:
    """Return the samples at some positions as a split, whose ``ids`` say which samples of the original they are."""
    return replace(
        split,
        take=TakenAt(split.take, positions.numpy()),
        y=split.y[positions],
        ids=positions if split.ids is None else split.ids[positions],
        truth=None if split.truth is None else split.truth[positions],
        blocks=None if split.blocks is None else split.blocks.at(positions),
    )


@dataclass(frozen=True)
class TakenAt:
    """Takes rows by their place in an array of positions; importable, so that a split of it can be sent.

    Attributes:
        take: of the original.
        positions: in it, int64 [n].
    """

    take: Take
    positions: np.ndarray

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return the samples of some rows."""
        return self.take(self.positions[rows])


def wrong_share(split: Split, positions: Tensor) -> float | None:
    """Return which share of some samples has a wrong label; None where no true labels are known."""
    if split.truth is None or not len(positions):
        return None
    wrong = split.y[positions] != split.truth[positions]
    return float(wrong.double().mean())

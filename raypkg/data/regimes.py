"""Harder training data made from any data set: wrong labels, rare classes, near-duplicates. Pixels are never copied."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import Dataset

from . import Data, load_data
from .blocks import Take
from .split import Split
from .store.cache import cache_folder
from .store.parts import Stream

LARGEST = 2**31  # samples, after repetition


def open_data(chosen: Dataset, seed: int | None = None) -> Data:
    """Load the data set that settings name, its training split changed as they say.

    The order is imbalance, noise, repeat: copies of a sample share its label. All three act on the whole training
    split, **held-out samples included**, so that no method sees a label that a user in this position would not have;
    copies of a sample are held out together. The test split stays as it is.

    Args:
        chosen: name, options, ``noise``, ``imbalance``, ``repeat`` and their ``seed``.
        seed: of the draws where ``chosen`` has none; a run stores it there.

    Raises:
        UserError: the data set cannot be read, has one class and is to have wrong labels, or nobody gives a seed.
    """
    data = load_data(chosen.name, chosen.options, cache=_stream(chosen))
    if chosen.streamed and data.train.blocks is None:
        raise UserError(f"dataset.streamed: the samples of {chosen.name!r} are in memory: leave it out")
    train = data.train
    seed = seed if chosen.seed is None else chosen.seed
    if seed is None:
        if chosen.is_drawn:
            raise UserError("dataset.noise and dataset.imbalance are drawn by a seed: give dataset.seed")
        seed = 0
    if chosen.imbalance < 1:
        train = taken(train, long_tail(train.y, chosen.imbalance, generator(seed, "imbalance")))
    if chosen.noise:
        train = with_wrong_labels(train, chosen.noise, generator(seed, "noise"))
    if chosen.repeat > 1:
        train = taken(train, repeated_positions(len(train), chosen.repeat))
    return data._replace(train=train)


def _stream(chosen: Dataset) -> Stream | None:
    """Return where stores are read by blocks, if the settings ask for that."""
    return Stream(chosen.streamed, chosen.window, cache_folder()) if chosen.streamed else None


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

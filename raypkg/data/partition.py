"""Splitting samples into parts with the same mix of classes: index arrays, never copies."""

import torch
from torch import Tensor

from raypkg.core.errors import UserError


def hold_out(
    y: Tensor, fraction: float, generator: torch.Generator, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split positions into those to train on and a held-out share of each class.

    Args:
        y: labels, int64 [n].
        fraction: in [0, 1); rounded for each class, which keeps at least one sample to train on.
        generator: draws which.
        ids: of the samples of other data that the rows stand for, int64 [n]: all rows of one go the same way, and so do
            the samples themselves where they are held out by the same generator.

    Returns:
        Two ascending int64 tensors, disjoint, together 0 … n−1.

    >>> kept, held = hold_out(torch.tensor([0, 0, 1, 1]), 0.5, torch.Generator().manual_seed(0))
    >>> len(kept), len(held)
    (2, 2)
    """
    if ids is not None:
        return _hold_out_by_id(y, fraction, generator, ids)
    order = torch.randperm(len(y), generator=generator)
    kept = []
    held = []
    for members in _by_class(order, y):
        size = min(round(fraction * len(members)), len(members) - 1)
        held.append(members[:size])
        kept.append(members[size:])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


def _hold_out_by_id(y: Tensor, fraction: float, generator: torch.Generator, ids: Tensor) -> tuple[Tensor, Tensor]:
    samples, sample_of_row = ids.unique(return_inverse=True)
    labels = torch.empty(len(samples), dtype=torch.int64)
    labels[sample_of_row] = y
    _, held = hold_out(labels, fraction, generator)
    is_held = torch.isin(sample_of_row, held)
    return (~is_held).nonzero()[:, 0], is_held.nonzero()[:, 0]


def stratified_shards(
    y: Tensor, shards: int, size: int, generator: torch.Generator, indices: Tensor | None = None
) -> list[Tensor]:
    """Draw disjoint shards of ``size`` samples, each with the classes in proportion to within one sample.

    Each class gives its share of all shards·size samples; these, class after class, are dealt out like cards, so that
    every shard gets ⌊t⌋ or ⌈t⌉ samples of a class whose exact share is t.

    Args:
        y: labels of all samples, int64 [n].
        shards: how many.
        size: samples in each.
        generator: draws which.
        indices: the samples to draw from; all when left out.

    Raises:
        UserError: fewer samples than shards · size, or a shard would hold no sample of some class.
    """
    if indices is None:
        indices = torch.arange(len(y))
    n = len(indices)
    if shards * size > n or size < 1:
        raise UserError(f"{shards} disjoint shards of {size} samples each cannot be had from {n} samples")
    order = indices[torch.randperm(n, generator=generator)]
    labels, counts = y[order].unique(return_counts=True)  # [C]
    shares = _apportion(counts, shards * size)
    if shares.min() < shards:
        rarest = shares.argmin()
        raise UserError(
            f"a shard of {size} samples holds none of class {labels[rarest]} ({counts[rarest]} samples):"
            " use fewer or larger shards"
        )
    classes = _by_class(order, y)
    dealt = [members[:share] for members, share in zip(classes, shares.tolist(), strict=True)]
    # Neighbours go to different shards, so a class, which lies in one run, reaches every shard to within one sample.
    hands = torch.cat(dealt).view(size, shards)
    return [hand.sort().values for hand in hands.unbind(1)]


def _by_class(order: Tensor, y: Tensor) -> list[Tensor]:
    """Return the positions of each class that occurs, in the order given, classes ascending."""
    labels = y[order]
    return [order[labels == label] for label in labels.unique()]


def _apportion(counts: Tensor, total: int) -> Tensor:
    """Divide ``total`` in proportion to the counts: rounded down, and one more for the largest remainders."""
    n = int(counts.sum())
    exact = counts * total  # n times the exact shares, so that all stays in integers
    shares = exact // n
    left = total - int(shares.sum())
    largest_first = (exact % n).argsort(descending=True, stable=True)
    shares[largest_first[:left]] += 1
    return shares

"""Splitting samples into parts with the same mix of classes: index arrays, never copies."""

import torch
from torch import Tensor

from raypkg.core.errors import UserError


def hold_out(y: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split positions into those to train on and a held-out share of each class.

    Args:
        y: labels, int64 [n].
        fraction: in [0, 1); rounded for each class, which keeps at least one sample to train on.
        generator: draws which.

    Returns:
        Two ascending int64 tensors, disjoint, together 0 … n−1.

    >>> kept, held = hold_out(torch.tensor([0, 0, 1, 1]), 0.5, torch.Generator().manual_seed(0))
    >>> len(kept), len(held)
    (2, 2)
    """
    order = torch.randperm(len(y), generator=generator)
    members = [order[y[order] == label] for label in y.unique()]
    sizes = [min(round(fraction * len(member)), len(member) - 1) for member in members]
    held = torch.cat([member[:size] for member, size in zip(members, sizes, strict=True)])
    kept = torch.cat([member[size:] for member, size in zip(members, sizes, strict=True)])
    return kept.sort().values, held.sort().values


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
    indices = torch.arange(len(y)) if indices is None else indices
    if shards * size > len(indices) or size < 1:
        raise UserError(f"{shards} disjoint shards of {size} samples each cannot be had from {len(indices)} samples")
    order = indices[torch.randperm(len(indices), generator=generator)]
    labels, counts = y[order].unique(return_counts=True)
    shares = _apportion(counts, shards * size)
    if shares.min() < shards:
        label, count = int(labels[shares.argmin()]), int(counts[shares.argmin()])
        raise UserError(
            f"a shard of {size} samples holds none of class {label} ({count} samples): use fewer or larger shards"
        )
    chosen = [order[y[order] == label][:share] for label, share in zip(labels, shares.tolist(), strict=True)]
    return [hand.sort().values for hand in torch.cat(chosen).view(size, shards).unbind(1)]


def _apportion(counts: Tensor, total: int) -> Tensor:
    """Divide ``total`` in proportion to the counts: rounded down, and one more for the largest remainders."""
    exact, n = counts * total, int(counts.sum())
    shares = exact // n
    shares[(exact % n).argsort(descending=True, stable=True)[: total - int(shares.sum())]] += 1
    return shares

"""Index arrays that partition samples into parts with the same mix of classes."""

import torch
from torch import Tensor

from raypkg.core.errors import UserError


def hold_out(
    y: Tensor, fraction: float, generator: torch.Generator, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split positions into training positions and a held-out share of each class.

    The share, in [0, 1), is rounded per class; each class keeps at least one training sample. ``ids``, int64 [n], name
    the sample that each row stands for. Rows of one sample stay together, and the draw is that of a data set which
    holds each of these samples once. Both results ascend; together they are 0 … n−1.
    """
    if ids is not None:
        samples, sample_of_row = ids.unique(return_inverse=True)
        labels = torch.empty(len(samples), dtype=torch.int64)
        labels[sample_of_row] = y
        _, held_out = hold_out(labels, fraction, generator)
        is_held_out = torch.isin(sample_of_row, held_out)
        return (~is_held_out).nonzero()[:, 0], is_held_out.nonzero()[:, 0]
    training = []
    validation = []
    for members in _by_class(torch.randperm(len(y), generator=generator), y):
        size = min(round(fraction * len(members)), len(members) - 1)
        validation.append(members[:size])
        training.append(members[size:])
    return torch.cat(training).sort().values, torch.cat(validation).sort().values


def stratified_shards(
    y: Tensor, shards: int, size: int, generator: torch.Generator, indices: Tensor | None = None
) -> list[Tensor]:
    """Draw disjoint shards of ``size`` samples, each with the classes in proportion to within one sample.

    Each class contributes its share of all shards·size samples. These are dealt like cards, class by class, so that
    every shard gets ⌊t⌋ or ⌈t⌉ samples of a class whose exact share is t. ``y`` holds the labels of all samples;
    ``indices`` restricts the draw to some of them. A shard that would lack a class is refused.
    """
    if indices is None:
        indices = torch.arange(len(y))
    n = len(indices)
    if shards * size > n or size < 1:
        raise UserError(f"{shards} disjoint shards of {size} samples each cannot be had from {n} samples")
    order = indices[torch.randperm(n, generator=generator)]
    labels, counts = y[order].unique(return_counts=True)  # [C]
    # The exact share of a class, rounded down, plus one for the largest remainders. Integers keep this exact.
    exact = counts * (shards * size)  # n times the exact shares
    shares = exact // n
    left = shards * size - int(shares.sum())
    largest_first = (exact % n).argsort(descending=True, stable=True)
    shares[largest_first[:left]] += 1
    if shares.min() < shards:
        rarest = shares.argmin()
        missing = f"class {labels[rarest]} ({counts[rarest]} samples)"
        raise UserError(f"a shard of {size} samples holds none of {missing}: use fewer or larger shards")
    dealt = [members[:share] for members, share in zip(_by_class(order, y), shares.tolist(), strict=True)]
    # Consecutive samples go to different shards, so each class, a consecutive run, reaches all shards evenly.
    hands = torch.cat(dealt).view(size, shards)
    return [hand.sort().values for hand in hands.unbind(1)]


def _by_class(order: Tensor, y: Tensor) -> list[Tensor]:
    """Return the positions of each class that occurs, in the order given, classes ascending."""
    labels = y[order]
    return [order[labels == label] for label in labels.unique()]

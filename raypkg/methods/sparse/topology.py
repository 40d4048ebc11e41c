"""Changing which weights of a layer exist, with exact counts, and how much of it changes when."""

import math

import torch
from torch import Tensor


def drop_fraction(first: float, progress: float, decay: str) -> float:
    """Return the share f of a layer's active weights to drop.

    cosine: f = f0/2 · (1 + cos πp)        linear: f = f0 · (1 − p)

    Args:
        first: f0.
        progress: p, the share of training that is done.
        decay: "cosine" or "linear".

    >>> drop_fraction(0.5, 0.5, "cosine"), drop_fraction(0.5, 0.5, "linear")
    (0.25, 0.25)
    """
    return first / 2 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else first * (1 - progress)


def gradual_density(last: float, progress: float) -> float:
    """Return the density d + (1 − d)·(1 − p)³ of gradual pruning (arXiv:1710.01878), p the share of pruning done.

    >>> gradual_density(0.5, 0.0), gradual_density(0.5, 0.5), gradual_density(0.5, 1.0)
    (1.0, 0.5625, 0.5)
    """
    return last + (1 - last) * (1 - progress) ** 3


def dropped(mask: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return the mask without its ``count`` active weights of the lowest scores, and those of ∞ kept.

    Args:
        mask: bool.
        scores: of the active weights in their order, [k].
        count: fewer go where fewer scores are finite.
    """
    count = min(count, int(scores.isfinite().sum()))
    active = mask.flatten().nonzero()[:, 0]  # [k]
    left = mask.flatten().clone()
    left[active[_first(-scores, count)]] = False
    return left.view(mask.shape)


def grown(mask: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return the mask with the ``count`` inactive weights of the highest scores.

    Args:
        mask: bool.
        scores: like the mask; those of active weights are not looked at.
        count: at most the number of inactive weights.
    """
    inactive = (~mask.flatten()).nonzero()[:, 0]
    more = mask.flatten().clone()
    more[inactive[_first(scores.flatten()[inactive], count)]] = True
    return more.view(mask.shape)


def _first(scores: Tensor, count: int) -> Tensor:
    """Return the places of the highest scores; of equal ones the first, on every machine."""
    if not count:
        return scores.new_empty(0, dtype=torch.int64)
    limit = scores.topk(count, sorted=False).values.min()
    above, equal = ((scores > limit).nonzero()[:, 0], (scores == limit).nonzero()[:, 0])
    return torch.cat([above, equal[: count - len(above)]])

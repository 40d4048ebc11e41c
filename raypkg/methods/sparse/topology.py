"""Changing which weights of a layer exist, with exact counts, and how much of it changes when."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from .masks import active_counts, allot


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
    if decay == "linear":
        return first * (1 - progress)
    wave = 1 + math.cos(math.pi * progress)  # from 2 to 0
    return first / 2 * wave


def gradual_density(last: float, progress: float) -> float:
    """Return the density d + (1 − d)·(1 − p)³ of gradual pruning (arXiv:1710.01878), p the share of pruning done.

    >>> gradual_density(0.5, 0.0), gradual_density(0.5, 0.5), gradual_density(0.5, 1.0)
    (1.0, 0.5625, 0.5)
    """
    return last + (1 - last) * (1 - progress) ** 3


def surplus(masks: Mapping[str, Tensor], density: float) -> dict[str, int]:
    """Return how many weights each layer has above one density for all; every layer may keep one.

    >>> surplus({"a": torch.ones(10).bool(), "b": torch.ones(2).bool()}, 0.25)
    {'a': 7, 'b': 1}
    """
    sizes = {name: mask.numel() for name, mask in masks.items()}
    total = round(density * sum(sizes.values()))
    targets = allot(sizes, total, sizes)
    excess = {}
    for name, count in active_counts(masks).items():
        target = max(1, targets[name])
        excess[name] = max(0, count - target)
    return excess


def dropped(mask: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return the mask without its ``count`` active weights of the lowest scores, and those of ∞ kept.

    Args:
        mask: bool.
        scores: of the active weights in their order, [k].
        count: fewer go where fewer scores are finite.
    """
    finite = int(scores.isfinite().sum())
    count = min(count, finite)
    lowest = _highest(-scores, count)  # places among the active weights
    remaining = mask.flatten().clone()
    active = _places(remaining)  # [k]
    remaining[active[lowest]] = False
    return remaining.view(mask.shape)


def grown(mask: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return the mask with the ``count`` inactive weights of the highest scores.

    Args:
        mask: bool.
        scores: like the mask; those of active weights are ignored.
        count: at most the number of inactive weights.
    """
    extended = mask.flatten().clone()
    inactive = _places(~extended)
    candidates = scores.flatten()[inactive]
    highest = _highest(candidates, count)  # places among the inactive weights
    extended[inactive[highest]] = True
    return extended.view(mask.shape)


def zero_changed(weight: Tensor, mask: Tensor, before: Tensor, optimizer: Optimizer) -> None:
    """Zero what left and what is new: the weight, and what the optimiser remembers of it.

    The squares of Adam are the layer's mean where weights are new: from zero, their first steps would be far too long.

    Args:
        weight: a parameter, changed in place.
        mask: which of its weights exist.
        before: which existed before the change.
        optimizer: whose state is changed in place, too.
    """
    stays = mask & before
    weight.data.mul_(stays)
    for name, value in optimizer.state.get(weight, {}).items():
        if not isinstance(value, Tensor) or value.shape != weight.shape:
            continue  # such as Adam's count of steps
        value.mul_(stays)
        if name == "exp_avg_sq" and stays.any():
            value[mask & ~before] = value[stays].mean()


def _highest(scores: Tensor, count: int) -> Tensor:
    """Return the places of the highest scores; of equal ones the first.

    ``topk`` alone leaves the choice among equals to the machine. The count must not depend on it, and neither may the
    masks: drop rules give whole groups of weights one score.
    """
    if not count:
        return scores.new_empty(0, dtype=torch.int64)
    best, _ = scores.topk(count, sorted=False)
    limit = best.min()
    above = _places(scores > limit)
    equal = _places(scores == limit)
    missing = count - len(above)
    return torch.cat([above, equal[:missing]])


def _places(mask: Tensor) -> Tensor:
    """Return where a flat mask is true."""
    return mask.nonzero()[:, 0]

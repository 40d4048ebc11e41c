"""The budget protocol: how many samples of each class, and each class selected by itself.

A class's picks depend only on its own samples, the seed and its label, so they are the same wherever the class sits.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.registry import Entry
from raypkg.core.seeds import generator

from .coreset import Coreset
from .coresets import coreset
from .gradients import HeadView


def budget_of(fraction: float, n: int) -> int:
    """Return how many of n samples a fraction is: rounded, at least 1.

    Raises:
        UserError: the fraction is outside (0, 1], or n < 1.

    >>> budget_of(0.1, 1797)
    180
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction {fraction}: must be above 0 and at most 1")
    if n < 1:
        raise UserError(f"a fraction of {n} samples: there must be at least 1")
    return max(1, round(fraction * n))


def class_budgets(counts: Tensor, budget: int) -> Tensor:
    """Split a budget over classes in proportion to their counts, by largest remainder.

    The total is exact, no class gets more than it has, and while the budget reaches, none that has samples goes
    without: it takes one from the class with the largest share. Ties go to the lower class.

    Args:
        counts: samples per class, int64 [C].
        budget: 1 … Σ counts.

    Returns:
        The budgets, int64 [C].

    >>> import torch
    >>> class_budgets(torch.tensor([50, 30, 20, 0, 1]), 10)
    tensor([4, 3, 2, 0, 1])
    """
    _check_budget(budget, int(counts.sum()))
    shares = budget * counts // counts.sum()
    remainders = budget * counts % counts.sum()
    shares[remainders.sort(descending=True, stable=True).indices[: budget - int(shares.sum())]] += 1
    if budget >= counts.count_nonzero():
        for empty in ((counts > 0) & (shares == 0)).nonzero():
            shares[shares.argmax()] -= 1
            shares[empty] = 1
    return shares


def select_class(
    view: HeadView,
    budget: int,
    entry: Entry,
    *,
    seed: int,
    label: int | str,
    options: Mapping[str, Any],
    valid: HeadView | None = None,
) -> Coreset:
    """Select from the samples of one class, with the generator named (seed, "select", label).

    Args:
        view: the class's samples and no others.
        budget: 1 … n.
        entry: a coreset method.
        seed: of the whole selection.
        label: names the class.
        options: the method's own.
        valid: validation samples, for the methods that use them.

    Returns:
        Exactly ``budget`` positions in the view.

    Raises:
        UserError: budget out of range, bad options, or the method broke its contract.
    """
    _check_budget(budget, len(view))
    rng = generator(seed, "select", label)
    picked = entry(view, budget, options=options, rng=rng, valid=valid)
    if not isinstance(picked, Coreset) or len(picked) != budget or picked.indices.max() >= len(view):
        raise UserError(f"coreset method {entry.name!r} must return a Coreset of {budget} out of {len(view)}")
    return picked


def select(
    view: HeadView,
    budget: int,
    name: str,
    *,
    seed: int,
    options: Mapping[str, Any] | None = None,
    valid: HeadView | None = None,
    balanced: bool = True,
) -> Coreset:
    """Select ``budget`` positions of the view by the method of that name.

    Args:
        view: n samples of all classes.
        budget: 1 … n.
        name: of a coreset method, or ``package.module:function``.
        seed: names the generators.
        options: the method's own.
        valid: validation samples; a class sees those of its label, if it has any.
        balanced: class by class in proportion to the counts; otherwise all samples at once.

    Raises:
        UserError: unknown method, bad options, budget out of range.
    """
    entry, options = coreset[name], options or {}
    if not balanced:
        return select_class(view, budget, entry, seed=seed, label="all", options=options, valid=valid)
    budgets = class_budgets(view.y.bincount(minlength=view.logits.shape[1]), budget)
    parts = []
    for label in budgets.nonzero()[:, 0].tolist():
        members, share, same = (view.y == label).nonzero()[:, 0], int(budgets[label]), _of_class(valid, label)
        part = select_class(view[members], share, entry, seed=seed, label=label, options=options, valid=same)
        parts.append(part.at(members))
    return Coreset.concat(parts)


def _of_class(valid: HeadView | None, label: int) -> HeadView | None:
    if valid is None or not (valid.y == label).any():
        return None
    return valid[valid.y == label]


def _check_budget(budget: int, n: int) -> None:
    if not 1 <= budget <= n:
        raise UserError(f"budget {budget}: must be from 1 to the number of samples, {n}")

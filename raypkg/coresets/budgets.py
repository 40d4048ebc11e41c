"""The budget protocol: how many samples of each class, and each class selected by itself.

A class's picks depend only on its own samples, the seed and its label, so they are the same wherever the class sits.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.registry import USER_CODE, Entry
from raypkg.core.seeds import generator
from raypkg.data.coreset import Coreset

from .gradients import HeadView
from .record import Record
from .rules import coreset, needs_gradients, sizes_itself

GIBIBYTE = 2**30


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
    samples: HeadView | Record,
    budget: int,
    entry: Entry,
    *,
    seed: int,
    label: int | str,
    options: Mapping[str, Any],
    valid: HeadView | None = None,
    memory: int = GIBIBYTE,
    progress: float = 0.0,
) -> Coreset:
    """Select from the samples of one class, with the generator named (seed, "select", label).

    Args:
        samples: those of the class and no others.
        budget: 1 … n; all n for a method that sizes its coreset itself.
        entry: a coreset method.
        seed: of the whole selection.
        label: names the class.
        options: the method's own.
        valid: validation samples, for the methods that use them.
        memory: bytes that a method may use to save time; the picks do not depend on it.
        progress: share of the training that is done, for the methods that act on it.

    Returns:
        Exactly ``budget`` positions in the samples, or at most so many where the method sizes its coreset itself.

    Raises:
        UserError: budget out of range, bad options, or the method broke its contract.
    """
    _check_budget(budget, len(samples))
    free = sizes_itself(entry)
    if free and budget < len(samples):
        raise UserError(f"{entry.name} keeps as many samples as it sees fit: a budget of {budget} cannot be set")
    given = {"rng": generator(seed, "select", label), "valid": valid, "memory": memory, "progress": progress}
    try:
        picked = entry(samples, *([] if free else [budget]), options=options, **given)
    except Exception as error:
        if isinstance(error, UserError) or entry.source != USER_CODE:
            raise
        raise UserError(f"coreset method {entry.name!r} raised {type(error).__name__}: {error}") from error
    fits = isinstance(picked, Coreset) and (1 <= len(picked) <= budget if free else len(picked) == budget)
    if not fits or picked.indices.max() >= len(samples):
        raise UserError(f"coreset method {entry.name!r} must return a Coreset of {budget} out of {len(samples)}")
    return picked


def select(
    samples: HeadView | Record,
    budget: int,
    name: str,
    *,
    seed: int,
    options: Mapping[str, Any] | None = None,
    valid: HeadView | None = None,
    balanced: bool = True,
    memory: int = GIBIBYTE,
    progress: float = 0.0,
) -> Coreset:
    """Select ``budget`` positions of the samples by the method of that name.

    Args:
        samples: n samples of all classes.
        budget: 1 … n; all n for a method that sizes its coreset itself.
        name: of a coreset method, or ``package.module:function``.
        seed: names the generators.
        options: the method's own.
        valid: validation samples; a class sees those of its label, if it has any.
        balanced: class by class in proportion to the counts; otherwise all samples at once, as does a method that
            sizes its coreset itself.
        memory: bytes that a method may use to save time; the picks do not depend on it.
        progress: share of the training that is done, for the methods that act on it.

    Raises:
        UserError: unknown method, bad options, budget out of range, or a method that needs gradients got none.
    """
    entry = coreset[name]
    if needs_gradients(entry) and not isinstance(samples, HeadView):
        raise UserError(f"{name} selects by gradients: it needs a HeadView, not a {type(samples).__name__}")
    same: dict[str, Any] = {"seed": seed, "options": options or {}, "memory": memory, "progress": progress}
    if sizes_itself(entry) or not balanced:
        return select_class(samples, budget, entry, label="all", valid=valid, **same)
    budgets = class_budgets(samples.y.bincount(), budget)
    parts = []
    for label in budgets.nonzero()[:, 0].tolist():
        members, share = (samples.y == label).nonzero()[:, 0], int(budgets[label])
        of_class = _of_class(valid, label)
        part = select_class(samples[members], share, entry, label=label, valid=of_class, **same)
        parts.append(part.at(members))
    return Coreset.concat(parts)


def _of_class(valid: HeadView | None, label: int) -> HeadView | None:
    if valid is None or not (valid.y == label).any():
        return None
    return valid[valid.y == label]


def _check_budget(budget: int, n: int) -> None:
    if not 1 <= budget <= n:
        raise UserError(f"budget {budget}: must be from 1 to the number of samples, {n}")

"""The budget protocol: how many samples of each class, and each class selected by itself.

A class's picks depend only on its own samples, the seed and its label, so they are the same wherever the class sits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.registry import USER_CODE
from raypkg.core.seeds import generator
from raypkg.data.coreset import Coreset

from .gradients import HeadView
from .record import Record
from .rules import Rule, coreset

GIBIBYTE = 2**30
S = TypeVar("S", bound=HeadView | Record)


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
    n = int(counts.sum())
    _check_budget(budget, n)
    shares = budget * counts // n
    remainders = budget * counts % n
    left = budget - int(shares.sum())
    largest_first = remainders.sort(descending=True, stable=True).indices
    shares[largest_first[:left]] += 1
    if budget >= counts.count_nonzero():
        for empty in ((counts > 0) & (shares == 0)).nonzero():
            shares[shares.argmax()] -= 1
            shares[empty] = 1
    return shares


@dataclass(frozen=True)
class ClassSamples(Generic[S]):
    """The samples of one class, as a rule is to see them.

    Attributes:
        label: of the class.
        members: positions of its samples, int64 [n].
        samples: what the rule sees of them.
        target: the samples of the class to select for, if they are others.
    """

    label: int
    members: Tensor
    samples: S
    target: HeadView | None


def select_each(
    classes: Iterable[ClassSamples[S]],
    budgets: Sequence[int],
    choose: Callable[..., Coreset],
) -> Iterator[tuple[ClassSamples[S], Coreset]]:
    """Select from one class after the other, each by itself.

    Args:
        classes: asked for one at a time, so that those computed when their turn comes are never all in memory.
        budgets: by label; nothing is selected from a class whose budget is 0.
        choose: ``select_class`` with everything that is the same for all classes.

    Yields:
        Each class with its picks, which are among its ``members``.
    """
    for part in classes:
        budget = budgets[part.label]
        if not budget:
            yield part, Coreset.concat([])
            continue
        picked = choose(part.samples, budget, label=part.label, target=part.target)
        yield part, picked.at(part.members)


def select_class(
    samples: HeadView | Record,
    budget: int,
    rule: Rule,
    *,
    seed: int,
    label: int | str,
    options: Mapping[str, Any],
    target: HeadView | None = None,
    memory: int = GIBIBYTE,
    progress: float = 0.0,
) -> Coreset:
    """Select from the samples of one class, with the generator named (seed, "select", label).

    Args:
        samples: those of the class and no others.
        budget: 1 … n; all n for a rule that sizes its coreset itself.
        rule: the rule.
        seed: of the whole selection.
        label: names the class.
        options: the rule's own.
        target: the samples to select for, for the rules that have a target; None = those selected from.
        memory: bytes that a rule may use to save time; the picks do not depend on it.
        progress: share of the training that is done, for the rules that act on it.

    Returns:
        Exactly ``budget`` positions in the samples, or at most that many where the rule sizes its coreset itself.

    Raises:
        UserError: budget out of range, bad options, a target seen by another model, or the rule broke its contract.
    """
    n = len(samples)
    _check_budget(budget, n)
    _check_target(target, samples)
    if rule.sizes_itself and budget < n:
        raise UserError(f"{rule.name} keeps as many samples as it sees fit: a budget of {budget} cannot be set")
    arguments = (samples,) if rule.sizes_itself else (samples, budget)
    supplied = {
        "rng": generator(seed, "select", label),
        "target": target,
        "valid": target,
        "memory": memory,
        "progress": progress,
    }
    try:
        picked = rule(*arguments, options=options, **supplied)
    except Exception as error:
        if isinstance(error, UserError) or rule.source != USER_CODE:
            raise
        kind = type(error).__name__
        raise UserError(f"coreset rule {rule.name!r} raised {kind}: {error}") from error
    if not _keeps_contract(picked, budget, n, rule):
        raise UserError(f"coreset rule {rule.name!r} must return a Coreset of {budget} out of {n}")
    return picked


def select(
    samples: HeadView | Record,
    budget: int,
    name: str,
    *,
    seed: int,
    options: Mapping[str, Any] | None = None,
    target: HeadView | None = None,
    balanced: bool = True,
    memory: int = GIBIBYTE,
    progress: float = 0.0,
) -> Coreset:
    """Select ``budget`` positions of the samples by the rule of that name.

    Args:
        samples: n samples of all classes.
        budget: 1 … n; all n for a rule that sizes its coreset itself.
        name: of a coreset rule, or ``package.module:function``.
        seed: names the generators.
        options: the rule's own.
        target: the samples to select for, seen by the same model, for the rules that have a target; a class sees
            those of its label, and where there are none, its own. None = the samples selected from.
        balanced: class by class in proportion to the counts; otherwise all samples at once, as does a rule that
            cannot go by class.
        memory: bytes that a rule may use to save time; the picks do not depend on it.
        progress: share of the training that is done, for the rules that act on it.

    Raises:
        UserError: unknown rule, bad options, budget out of range, or samples that the rule cannot select by.

    >>> import torch
    >>> view = HeadView(torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]), torch.ones(3, 1), torch.zeros(3).long())
    >>> select(view, 1, "grand", seed=0).indices  # the sample that the model gets wrong
    tensor([1])
    """
    rule = coreset[name]
    if rule.sees == "gradients" and not isinstance(samples, HeadView):
        raise UserError(f"{name} selects by gradients: it needs a HeadView, not a {type(samples).__name__}")
    if rule.sees == "record" and rule.takes and not isinstance(samples, rule.takes):
        kind = type(samples).__name__
        raise UserError(f"{name} selects by what a training recorded: it needs a Record, not a {kind}")
    choose = partial(
        select_class,
        rule=rule,
        seed=seed,
        options=options or {},
        memory=memory,
        progress=progress,
    )
    if not (balanced and rule.by_class):
        return choose(samples, budget, label="all", target=target)
    budgets = class_budgets(samples.y.bincount(), budget)
    labels = budgets.nonzero()[:, 0]
    classes = _cut(samples, target, labels.tolist())
    picks = [picked for _, picked in select_each(classes, budgets.tolist(), choose)]
    return Coreset.concat(picks)


def _cut(
    samples: HeadView | Record, target: HeadView | None, labels: list[int]
) -> Iterator[ClassSamples[HeadView | Record]]:
    """Yield the classes of these labels."""
    for label in labels:
        members = (samples.y == label).nonzero()[:, 0]
        yield ClassSamples(label, members, samples[_in_a_row(members)], _of_class(target, label))


def _in_a_row(members: Tensor) -> Tensor | slice:
    """Return ascending positions as a slice if none is left out: what is there need not be copied then."""
    first = int(members[0])
    end = int(members[-1]) + 1
    return slice(first, end) if end - first == len(members) else members


def _of_class(target: HeadView | None, label: int) -> HeadView | None:
    if target is None:
        return None
    members = target.y == label
    return target[members] if members.any() else None


def _keeps_contract(picked: object, budget: int, n: int, rule: Rule) -> bool:
    if not isinstance(picked, Coreset):
        return False
    least = 1 if rule.sizes_itself else budget
    if not least <= len(picked) <= budget:
        return False
    return int(picked.indices.max()) < n


def _check_target(target: HeadView | None, samples: HeadView | Record) -> None:
    if target is None or not isinstance(samples, HeadView):
        return
    if not len(target):
        raise UserError("the target has no samples")
    theirs = (target.num_classes, target.width)
    ours = (samples.num_classes, samples.width)
    if theirs != ours:
        raise UserError(f"the target has classes and features {theirs}, the samples {ours}: they need one model")


def _check_budget(budget: int, n: int) -> None:
    if not 1 <= budget <= n:
        raise UserError(f"budget {budget}: must be from 1 to the number of samples, {n}")

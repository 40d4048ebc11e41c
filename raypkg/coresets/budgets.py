"""Selection in one process: the budget of each class, and each class selected by itself.

The picks of a class depend only on its own samples, the seed and its label, so they are the same wherever it is stored.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raypkg.core.errors import UserError, described
from raypkg.core.registry import USER_CODE
from raypkg.core.seeds import generator
from raypkg.data.coreset import Coreset
from raypkg.engine.worker import CPU, memory_bound

from .gradients import HeadView
from .record import Record, Rows
from .rules import Rule, coreset

GIBIBYTE = 2**30


def budget_of(fraction: float, n: int) -> int:
    """Return the budget of a fraction of n samples: rounded, at least 1."""
    return max(1, round(fraction * n))


def class_budgets(counts: Tensor, budget: int) -> Tensor:
    """Split a budget over classes in proportion to their counts, by largest remainder; counts and result int64 [C].

    The total is exact and no class gets more than it has. If the budget allows, every class with samples gets at least
    one, taken from the class with the largest share. Ties go to the lower class.
    """
    n = int(counts.sum())
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


def select_class(
    samples: HeadView | Record | Rows,
    budget: int,
    rule: Rule,
    *,
    seed: int,
    label: int | str,
    options: Mapping[str, Any],
    target: HeadView | Rows | None = None,
    memory: int = GIBIBYTE,
    progress: float = 0.0,
    device: torch.device = CPU,
    others: Sequence[HeadView] = (),
    **of_models: Any,
) -> Coreset:
    """Select positions in the samples of one class, with the generator named (seed, "select", label).

    Views that fill at most a sixteenth of the device's memory go there, as a rule may need several times as much; those
    of a user's rule stay where they are. ``others`` and ``full_norms`` are for rules that declare them. Other arguments
    as in ``select``.
    """
    n = len(samples)
    if isinstance(target, HeadView) and not len(target):
        raise UserError("the target has no samples")
    if rule.sizes_itself and budget < n:
        raise UserError(f"{rule.name} keeps as many samples as it sees fit: a budget of {budget} cannot be set")

    parts: tuple[Any, ...] = (samples, target, *others)
    size = sum(part.logits.nbytes + part.features.nbytes for part in parts if isinstance(part, HeadView))
    if device != CPU and rule.source != USER_CODE and 4 * size <= memory_bound(None, device):
        samples, target, *others = (part.to(device) if isinstance(part, HeadView) else part for part in parts)
    arguments = (samples,) if rule.sizes_itself else (samples, budget)
    given = {"target": target, "valid": target, "memory": memory, "progress": progress, "others": others, **of_models}
    picked = rule(*arguments, options=options, rng=generator(seed, "select", label), **given)
    least = 1 if rule.sizes_itself else budget
    if not isinstance(picked, Coreset) or not least <= len(picked) <= budget or int(picked.indices.max()) >= n:
        came = described(picked)
        if isinstance(picked, Coreset) and len(picked):
            came += f", largest index {int(picked.indices.max())}"
        raise UserError(f"coreset rule {rule.name!r} must return a Coreset of {budget} out of {n}, not {came}")
    return Coreset(picked.indices.cpu(), picked.weights.cpu())


def select(
    samples: HeadView | Record | Rows,
    budget: int,
    name: str,
    *,
    seed: int,
    options: Mapping[str, Any] | None = None,
    target: HeadView | Rows | None = None,
    balanced: bool = True,
    memory: int = GIBIBYTE,
    progress: float = 0.0,
    full_norms: Callable[[Tensor], Tensor] | None = None,
    device: torch.device = CPU,
) -> Coreset:
    """Select ``budget`` positions of the samples by the rule of that name.

    Args:
        samples: n samples of all classes; `Rows` for rules that go by them, which see all at once.
        budget: 1 … n; all n for a rule that sizes its coreset itself.
        name: of a coreset rule, or ``package.module:function``.
        seed: names the generators.
        options: the rule's own.
        target: samples to select for, seen by the same model, for rules that have a target; a class sees those of its
            label, or its own if there are none. None = the samples selected from.
        balanced: class by class in proportion to the counts; otherwise all samples at once, as always with a rule that
            cannot go by class.
        memory: bytes that a rule may use to save time; the picks do not depend on it.
        progress: share of the training that is done.
        full_norms: maps positions, ascending, to the norms of their full gradients, for rules that request them.
        device: computes the selection, whose samples go there if they fit, class by class.

    Raises:
        UserError: unknown rule, bad options, budget out of range, or samples that the rule cannot select by.

    >>> view = HeadView(torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]), torch.ones(3, 1), torch.zeros(3).long())
    >>> select(view, 1, "grand", seed=0).indices  # the sample that the model gets wrong
    tensor([1])
    """
    rule = coreset[name]
    if not 1 <= budget <= len(samples):
        raise UserError(f"budget {budget}: must be from 1 to the number of samples, {len(samples)}")
    needed = {"gradients": ("gradients", (HeadView,)), "rows": ("rows", (Rows,))}
    by, kinds = needed.get(rule.sees, ("what a training recorded", rule.takes or (object,)))
    for each in (samples, target) if rule.sees == "rows" and target is not None else (samples,):
        if not isinstance(each, kinds):
            needs = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{name} selects by {by}: it needs a {needs}, not a {type(each).__name__}")
    common: dict[str, Any] = {"seed": seed, "options": options or {}, "memory": memory, "progress": progress}
    common |= {"target": target, "device": device}
    if isinstance(samples, Rows) or not (balanced and rule.by_class):
        norms = full_norms and partial(full_norms, torch.arange(len(samples)))
        return select_class(samples, budget, rule, label="all", full_norms=norms, **common)

    budgets = class_budgets(samples.y.bincount(), budget)
    picks = []
    for label in budgets.nonzero()[:, 0].tolist():
        members = (samples.y == label).nonzero()[:, 0]
        first, end = int(members[0]), int(members[-1]) + 1
        consecutive = end - first == len(members)  # then a slice: nothing is copied
        part = samples[slice(first, end) if consecutive else members]
        if isinstance(target, HeadView):
            same = target.y == label
            common["target"] = target[same] if same.any() else None
        norms = full_norms and partial(full_norms, members)
        picked = select_class(part, int(budgets[label]), rule, label=label, full_norms=norms, **common)
        picks.append(picked.at(members.cpu()))
    return Coreset.concat(picks)

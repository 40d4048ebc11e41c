"""CCS: leave the hardest samples out, and draw as evenly as possible from all levels of difficulty."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from raypkg.core.errors import UserError
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.record import Record, margins_of
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("ccs", source="arXiv:2210.15809", sees="record")
def select(
    samples: HeadView | Record,
    budget: int,
    *,
    rng: torch.Generator,
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.3,
    strata: Annotated[int, Field(ge=1)] = 50,
) -> Coreset:
    """Drop the share β with the smallest area under the margin; draw as many from each stratum of the others.

    The strata are equal intervals of the margin. From the one of fewest samples on, each gets an equal part of the
    budget that is left, or all its samples where they are fewer. So rare levels of difficulty are covered as well as
    frequent ones, and wrong labels, whose margins are the smallest, are left out.

    Args:
        samples: with the margins that training recorded; or a view, with those of its model.
        budget: how many to draw.
        rng: draws within the strata.
        beta: β, the hard cut-off; fewer are dropped where the budget needs them. The paper has 0.3 where 10 % of
            CIFAR-10 are kept, and less the more are; wrong labels call for more than their share.
        strata: how many intervals.

    Differs from the paper: the margin is the log-odds of the label, see ``Record``; each class is stratified by itself
    unless ``select.balanced`` is false; a sample that was not trained on counts as one of the easiest.

    Raises:
        UserError: no margins were recorded.
    """
    margins = _margins(samples)
    shuffled = torch.randperm(len(margins), generator=rng)
    order = shuffled[margins[shuffled].sort(stable=True).indices]  # hardest first, equal ones in a random order
    dropped = min(int(beta * len(order)), len(order) - budget)
    kept = order[dropped:]
    kept = kept[torch.randperm(len(kept), generator=rng)]
    stratum = _strata(margins[kept], strata)
    shares = _even_shares(stratum.bincount(minlength=strata), budget)
    picks = [kept[stratum == level][:share] for level, share in enumerate(shares)]
    return Coreset.uniform(torch.cat(picks))


def _margins(samples: HeadView | Record) -> Tensor:
    """Return the margins [n], the largest that is finite where a sample was not trained on."""
    if isinstance(samples, HeadView):
        return margins_of(cross_entropy(samples.logits, samples.y, reduction="none"))
    margins = samples.margins
    if margins is None or not margins.isfinite().any():
        raise UserError("ccs needs the margins that a training recorded of these samples: there are none")
    largest = margins[margins.isfinite()].max()
    return margins.clamp(max=largest)


def _strata(margins: Tensor, count: int) -> Tensor:
    """Return which of ``count`` equal intervals each margin is in [n]."""
    least, most = margins.double().aminmax()
    if least == most:
        return torch.zeros_like(margins, dtype=torch.int64)
    place = (margins.double() - least) / (most - least)  # in [0, 1]
    return (place * count).long().clamp(max=count - 1)


def _even_shares(counts: Tensor, budget: int) -> list[int]:
    """Split a budget evenly over strata of these sizes, none getting more than it has.

    >>> _even_shares(torch.tensor([5, 1, 0, 9]), 8)
    [3, 1, 0, 4]
    """
    shares = torch.zeros_like(counts)
    left = budget
    for position, stratum in enumerate(counts.argsort(stable=True)):
        even = left // (len(counts) - position)
        shares[stratum] = min(even, int(counts[stratum]))
        left -= int(shares[stratum])
    return shares.tolist()

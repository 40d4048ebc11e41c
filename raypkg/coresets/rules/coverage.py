"""Rules that cover the samples: no gradient, region of features or level of difficulty is left without a pick."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from raypkg.core.errors import UserError
from raypkg.coresets.facility import Distances, cluster_shares, facility_location, stochastic_facility_location
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.record import Record, margins_of
from raypkg.coresets.solvers import largest
from raypkg.data.coreset import Coreset

from . import coreset

BLOCK = 1024  # samples whose distances to all others are in memory at a time


@coreset("craig", source="arXiv:1906.01827", published={"weighted": True, "every_epochs": 20})
def craig(
    view: HeadView,
    budget: int,
    *,
    rng: torch.Generator,
    memory: int,
    target: HeadView | None = None,
    greedy: Literal["lazy", "stochastic"] = "lazy",
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.1,
) -> Coreset:
    """Choose the medoids whose gradients are closest to all gradients, and weigh each by the size of its cluster.

        S = argmin Σ_i min_{j∈S} ‖g_i − g_j‖,  |S| = k        w_j = γ_j · k/n

    with γ_j of the n samples nearest to medoid j. The gradient of mean(w · loss) over the medoids, Σ γ_j g_j / n, is
    then within Σ_i min_{j∈S} ‖g_i − g_j‖ / n of the mean gradient of all samples. With a target, i and n are its
    samples: a medoid nearest to none of them weighs 0. ``greedy="stochastic"`` takes the best of ⌈n/k · ln(1/ε)⌉ random
    candidates at each step (arXiv:1409.7938). The picks do not depend on ``memory``, the bytes for cached distances.

    Differs from the paper: the gradients are those of the last layer; a sample equally far from several medoids counts
    in equal parts for each; the weights are divided by their mean n/k.
    """
    distances = Distances(view, target, memory=memory)
    if greedy == "lazy":
        medoids = facility_location(distances, budget)
    else:
        sample = math.ceil(len(view) / budget * math.log(1 / epsilon))
        medoids = stochastic_facility_location(distances, budget, sample=sample, rng=rng)
    weights = cluster_shares(distances, medoids) * budget / len(distances.covered)  # γ · k/n
    return Coreset(medoids, weights.float())


@coreset("kcenter", source="arXiv:1708.00489")
def kcenter(view: HeadView, budget: int) -> Coreset:
    """Take the sample farthest from all chosen ones in feature space, again and again.

        argmax_i min_{j∈S} ‖h_i − h_j‖

    starting from the sample nearest to the mean of the features. The largest distance to a chosen sample is at most
    twice the smallest possible one. O(nD) time a step.

    Differs from the paper: no initial pool of chosen samples, and no mixed-integer program that refines the greedy
    choice or sets outliers aside.
    """
    h = view.features  # [n, D]

    def distances(centre: Tensor) -> Tensor:  # [1, D]; from differences, which are 0 for equal rows [n]
        return torch.cdist(h, centre, compute_mode="donot_use_mm_for_euclid_dist")[:, 0]

    latest = distances(h.mean(dim=0, keepdim=True)).argmin()[None]  # positions stay on the device of the view
    chosen = [latest]
    nearest = distances(h[latest])  # min_{j∈S} ‖h_i − h_j‖ [n]
    while len(chosen) < budget:
        nearest[latest] = -torch.inf  # never again, even if only its equals are left
        latest = nearest.argmax()[None]
        chosen.append(latest)
        nearest = nearest.minimum(distances(h[latest]))
    return Coreset.uniform(torch.cat(chosen))


@coreset("moderate", source="openreview:7D5EECbOaf9")
def moderate(view: HeadView, budget: int) -> Coreset:
    """Keep the samples whose distance to their class centre is closest to the median of their class.

        |d_i − median_{y_j = y_i} d_j|,   d_i = ‖h_i − mean_{y_j = y_i} h_j‖

    The median of an even number is the lower of the two in the middle.
    """
    deviation = view.features.new_empty(len(view))  # [n]
    for label in view.y.unique():
        members = view.y == label
        h = view.features[members]
        distances = (h - h.mean(dim=0)).norm(dim=1)
        deviation[members] = (distances - distances.median()).abs()
    return Coreset.uniform(largest(-deviation, budget))


@coreset("ccs", source="arXiv:2210.15809", sees="record")
def ccs(
    samples: HeadView | Record,
    budget: int,
    *,
    rng: torch.Generator,
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.3,
    strata: Annotated[int, Field(ge=1)] = 50,
) -> Coreset:
    """Drop the share β with the smallest area under the margin; draw as many from each stratum of the others.

    The strata are equal intervals of the margin. From the smallest one on, each gets an equal part of the budget that
    is left, or all its samples if they are fewer. Rare levels of difficulty are covered like frequent ones, and wrong
    labels, whose margins are the smallest, are dropped.

    Args:
        samples: with the margins that training recorded; or a view, with those of its model.
        budget: k.
        rng: draws within the strata.
        beta: β, the hard cut-off; less where the budget needs more samples. The paper has 0.3 where 10 % of CIFAR-10
            are kept, and less the more are; with wrong labels, give more than their share.
        strata: number of intervals.

    Differs from the paper: the margin is the log-odds of the label, see ``Record``; each class is stratified by itself
    unless ``select.balanced`` is false; a sample that was not trained on counts as one of the easiest.

    Raises:
        UserError: no margins were recorded.
    """
    if isinstance(samples, HeadView):
        margins = margins_of(cross_entropy(samples.logits, samples.y, reduction="none"))
    elif samples.margins is None or not samples.margins.isfinite().any():
        raise UserError("ccs needs the margins that a training recorded of these samples: there are none")
    else:
        margins = samples.margins.clamp(max=samples.margins[samples.margins.isfinite()].max())
    shuffled = torch.randperm(len(margins), generator=rng).to(margins.device)
    order = shuffled[margins[shuffled].sort(stable=True).indices]  # hardest first, equal ones in a random order
    dropped = min(int(beta * len(order)), len(order) - budget)
    rest = order[dropped:]
    rest = rest[torch.randperm(len(rest), generator=rng).to(rest.device)]

    # the interval of each margin [n]
    levels = margins[rest].double()
    least, most = levels.aminmax()
    if least == most:
        stratum = torch.zeros_like(rest)
    else:
        stratum = ((levels - least) / (most - least) * strata).long().clamp(max=strata - 1)

    # Split the budget evenly, over the smallest strata first, so that none gets more than it has.
    picks = []
    left = budget
    for position, level in enumerate(stratum.bincount(minlength=strata).argsort(stable=True).tolist()):
        picks.append(rest[stratum == level][: left // (strata - position)])
        left -= len(picks[-1])
    return Coreset.uniform(torch.cat(picks))


@coreset("d2", source="arXiv:2310.07931")
def d2(
    view: HeadView,
    budget: int,
    *,
    neighbours: Annotated[int, Field(ge=1)] = 10,
    forward: Annotated[float, Field(ge=0)] = 1.0,
    reverse: Annotated[float, Field(ge=0)] = 1.0,
    relative: bool = True,
) -> Coreset:
    """Spread difficulty over a graph of nearest neighbours, then take the highest score and lower those around it.

        s_i ← s_i + Σ_{j∈N(i)} exp(−γ_f d_ij²) s_j                 once, from the difficulties s_i = ‖p_i − e_i‖
        s_j ← s_j − exp(−γ_r d_ij²) s_i,  j ∈ N(i)                 after each pick i = argmax s

    with d the distance of features and N(i) the nearest ``neighbours`` of i. A high γ_f (``forward``) counts difficulty
    alone, a high γ_r (``reverse``) keeps neighbours in play. With ``relative``, d² is in units of its mean over all
    pairs of neighbours, so that one γ suits any features; false = as published.

    Differs from the paper: difficulty is the error of the view's model, where the paper has forgetting or the area
    under the margin over a whole training.
    """
    # the graph: nearest others of each sample, int64 [n, k], and the squares of their distances, float64 [n, k]
    rows = view.features.double()
    k = min(neighbours, len(view) - 1)
    parts = []
    for start in range(0, len(rows), BLOCK):
        distances = torch.cdist(rows[start : start + BLOCK], rows)  # [b, n]
        distances.diagonal(start).fill_(torch.inf)  # of each sample to itself
        parts.append(distances.topk(k, largest=False))
    near = torch.cat([part.indices for part in parts])
    squares = torch.cat([part.values.square() for part in parts])
    if relative:
        squares = squares / squares.mean().clamp(min=torch.finfo(squares.dtype).tiny)

    difficulty = view.residual.norm(dim=1).double()
    messages = (-forward * squares).exp() * difficulty[near]  # [n, k]
    scores = difficulty + messages.sum(dim=1)
    damping = (-reverse * squares).exp()
    chosen = []
    for _ in range(budget):
        best = int(scores.argmax())
        chosen.append(best)
        scores[near[best]] -= damping[best] * scores[best]
        scores[best] = -torch.inf  # never again: what is taken from it stays −inf
    return Coreset.uniform(torch.tensor(chosen))

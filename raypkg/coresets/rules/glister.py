"""GLISTER: greedily choose the samples whose gradient step lowers the validation loss most."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from raypkg.coresets.gradients import HeadView
from raypkg.coresets.solvers import largest
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("glister", source="arXiv:2012.10630")
def select(
    view: HeadView,
    budget: int,
    *,
    valid: HeadView | None = None,
    eta: Annotated[float | None, Field(gt=0)] = None,
    rounds: Annotated[int, Field(ge=1)] = 6,
) -> Coreset:
    """Add the samples with the largest <∇L_val(θ_S), g_i>, refreshing ∇L_val along the way.

        θ_S = θ − η Σ_{i∈S} g_i

    Moving the head moves the validation logits linearly, so ∇L_val(θ_S) is exact without a forward pass, and so is the
    curvature of L_val along a step. It gives an η with which the step of the whole budget does not overshoot. Where the
    refreshed choice then leaves a larger L_val(θ_S) than the one that is never refreshed, which is rare, that one is
    returned.

    Args:
        view: the samples; their own gradients stay those at θ.
        budget: how many to choose.
        valid: the samples of L_val; the view itself if None.
        eta: η, and no comparison with the choice that is never refreshed, as published; None = from the curvature.
        rounds: refreshes, at the start of equal parts of the budget; from the budget on, one before every choice.

    Differs from the paper: θ_S moves the last layer only; η is derived, where the paper takes the learning rate, at
    which the sum of hundreds of gradients leads far beyond the minimum.
    """
    valid = view if valid is None else valid
    gain = view.project(valid.mean())  # <∇L_val(θ), g_i> [n]
    if eta is not None:
        return Coreset.uniform(_refreshed(view, valid, gain, budget, eta, rounds))
    static = largest(gain, budget)
    step = view[static].sum()
    slope = gain[static].double().sum()  # <∇L_val(θ), Σ g_i>
    if slope <= 0:  # no step along them lowers the loss
        return Coreset.uniform(static)
    eta = safe_rate(valid, step, slope)
    picked = _refreshed(view, valid, gain, budget, eta, rounds)
    losses = [_loss(valid.moved(-eta * total)) for total in (view[picked].sum(), step)]
    return Coreset.uniform(picked if losses[0] <= losses[1] else static)


def safe_rate(valid: HeadView, step: Tensor, slope: Tensor) -> float:
    """Return an η at which the mean loss falls by at least η/2 · slope in θ − η·step, half of what the slope promises.

    The loss's second derivative in η is the mean variance of a = step [h; 1] under the model's probabilities. That is
    at most M = mean (max_c a_c − min_c a_c)² / 4 wherever the head is moved to, so η = slope / M falls by as much. η is
    doubled from there while it still does.

    Args:
        valid: the samples of the loss.
        step: any [C, D+1].
        slope: <∇L, step>, above 0.
    """
    change = valid.through(step).double()  # a [m, C]
    spread = change.amax(dim=1) - change.amin(dim=1)
    bound = spread.square().mean() / 4  # M
    logits = valid.logits.double()
    start = cross_entropy(logits, valid.y)
    eta = float(slope / bound)
    while cross_entropy(logits - 2 * eta * change, valid.y) <= start - eta * slope:
        eta *= 2
    return eta


def _refreshed(view: HeadView, valid: HeadView, gain: Tensor, budget: int, eta: float, rounds: int) -> Tensor:
    """Return the picks, given their gains at θ."""
    chosen = torch.empty(0, dtype=torch.int64)
    total = view[chosen].sum()  # Σ_{i∈S} g_i [C, D+1]
    for share in torch.arange(budget).tensor_split(min(rounds, budget)):
        if len(chosen):
            gradient = valid.moved(-eta * total).mean()  # ∇L_val(θ_S) [C, D+1]
            gain = view.project(gradient).index_fill(0, chosen, -torch.inf)
        best = largest(gain, len(share))
        chosen = torch.cat([chosen, best])
        total = total + view[best].sum()
    return chosen


def _loss(valid: HeadView) -> Tensor:
    return cross_entropy(valid.logits.double(), valid.y)

"""GLISTER: greedily choose the samples whose gradient step lowers the validation loss most."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from raypkg.coresets.gradients import HeadView, over_classes
from raypkg.coresets.solvers import AT_ONCE, largest, largest_bounded
from raypkg.data.coreset import Coreset

from . import coreset

SPARSE = 4  # one gain in so many by itself takes about as long as all of them at once
WORTH = 0.01  # a loss that falls further by no more than this share falls as far


@coreset("glister", source="arXiv:2012.10630")
def select(
    view: HeadView,
    budget: int,
    *,
    valid: HeadView | None = None,
    eta: Annotated[float | None, Field(gt=0)] = None,
    rounds: Annotated[int, Field(ge=1)] = 8,
    doublings: Annotated[int, Field(ge=0)] = 4,
) -> Coreset:
    """Add the samples with the largest <∇L_val(θ_S), g_i>, refreshing ∇L_val along the way.

        θ_S = θ − η Σ_{i∈S} g_i

    Moving the head moves the validation logits linearly, so ∇L_val(θ_S) is exact without a forward pass, and so is the
    curvature of L_val along a step. It gives an η with which a step of the whole budget does not overshoot. A greedy
    choice at twice that η may lead further, because it turns on its way: η is doubled for as long as the loss along
    the chosen step then falls further, and the refreshes with it, so that the way between two of them stays as long.

    Args:
        view: the samples; their own gradients stay those at θ.
        budget: how many to choose.
        valid: the samples of L_val; the view itself if None.
        eta: η, which is not doubled then, as published; None = from the curvature.
        rounds: refreshes at the first η, at the start of equal parts of the budget; from the budget on, one before
            every choice.
        doublings: of η, at most.

    Differs from the paper: θ_S moves the last layer only; η is derived, where the paper takes the learning rate, at
    which the sum of hundreds of gradients leads far beyond the minimum.
    """
    valid = view.arranged() if valid is None else valid.arranged()
    everyone = torch.arange(len(view))
    best, gains = steepest(view, everyone, valid, budget)  # the choice that is never refreshed
    if eta is not None:
        picked, _ = _refreshed(view, valid, best, eta, rounds)
        return Coreset.uniform(picked)
    change = valid.along(view[best])  # of the validation logits, Σ g_i [h; 1] [m, C]
    slope = gains.double().sum()  # <∇L_val(θ), Σ g_i>
    if slope <= 0:  # no step along them lowers the loss
        return Coreset.uniform(best)
    eta = safe_rate(valid, change, slope)
    static = best
    drop = _largest_drop(valid, change, eta)
    for _ in range(doublings + 1):
        picked, change = _refreshed(view, valid, static, eta, rounds)
        reached = _largest_drop(valid, change, eta)
        if reached < (1 + WORTH) * drop:
            break
        best = picked
        drop = reached
        eta *= 2
        rounds *= 2
    return Coreset.uniform(best)


def steepest(view: HeadView, left: Tensor, valid: HeadView, k: int) -> tuple[Tensor, Tensor]:
    """Return the k samples of the largest gains <∇L_val, g_i>, and the gains, descending.

    All n gains from ∇L_val take (m + n)·C·D multiplications. One by itself, the mean of <g_i, g_j> over the m
    validation samples, takes m(C + D), and with many classes few have to be computed, by the bound on all others. By
    the bound ‖∇L_val‖·‖g_i‖ few of the n have to be computed from ∇L_val, where errors are of different sizes.

    Args:
        view: n samples.
        left: the positions to choose from, ascending.
        valid: the m samples of L_val.
        k: 1 … len(left).
    """
    few = view.num_classes * view.width // (view.num_classes + view.width)  # gains that cost no more than ∇L_val
    if few >= max(k, AT_ONCE):
        bounds = _most(view, valid)[left]
        best = largest_bounded(bounds, lambda block: view[left[block]].inner(valid).mean(dim=1), k, at_most=few)
        if best:
            positions, gains = best
            return left[positions], gains
    steep = valid.mean()  # ∇L_val
    bounds = view.norms()[left] * steep.norm() * (1 + view.rounding)
    best = largest_bounded(bounds, lambda block: view[left[block]].project(steep), k, at_most=len(left) // SPARSE)
    if best:
        positions, gains = best
        return left[positions], gains
    gains = view.project(steep)[left]
    positions = largest(gains, k)
    return left[positions], gains[positions]


def _most(view: HeadView, valid: HeadView) -> Tensor:
    """Return a bound on each gain, in n·D and m·D steps [n].

    <∇L_val, g_i> = mean_j <p_i − e_i, p_j − e_j> (<h_i, h_j> + 1) ≤ ‖p_i − e_i‖ Σ_d |[h_i; 1]_d| t_d

    with t = mean_j ‖p_j − e_j‖ |[h_j; 1]|. Where features are not negative, and errors alike, it is close.
    """
    errors = valid.residual.norm(dim=1) / len(valid)  # ‖p_j − e_j‖ / m [m]
    t = errors @ valid.features.abs()  # of the features [D]
    reach = view.features.abs() @ t + errors.sum()  # Σ_d |[h_i; 1]_d| t_d [n]
    return view.residual.norm(dim=1) * reach * (1 + view.rounding)


def safe_rate(valid: HeadView, change: Tensor, slope: Tensor) -> float:
    """Return an η at which the mean loss falls by at least η/2 · slope in θ − η·M, half of what the slope promises.

    The loss's second derivative in η is the mean variance of a = M [h; 1] under the model's probabilities. That is at
    most V = mean (max_c a_c − min_c a_c)² / 4 wherever the head is moved to, so η = slope / V falls by as much. η is
    doubled from there while it still does.

    Args:
        valid: the samples of the loss.
        change: a, for any M [m, C].
        slope: <∇L, M>, above 0.
    """
    spread = change.amax(dim=1) - change.amin(dim=1)
    bound = spread.double().square().mean() / 4  # V
    start = _loss(valid.logits, valid.y)
    eta = float(slope / bound)
    while _loss(valid.logits - 2 * eta * change, valid.y) <= start - eta * slope:
        eta *= 2
    return eta


def _refreshed(view: HeadView, valid: HeadView, static: Tensor, eta: float, rounds: int) -> tuple[Tensor, Tensor]:
    """Return the picks, the first of which are those at θ, and how they change the validation logits at η = 1."""
    parts = static.tensor_split(min(rounds, len(static)))
    chosen = parts[0]
    change = valid.along(view[chosen])
    left = torch.ones(len(view), dtype=torch.bool)
    for part in parts[1:]:
        left[chosen] = False
        moved = valid.shifted(-eta * change)
        best, _ = steepest(view, left.nonzero()[:, 0], moved, len(part))
        chosen = torch.cat([chosen, best])
        change = change + valid.along(view[best])
    return chosen, change


def _largest_drop(valid: HeadView, change: Tensor, eta: float) -> Tensor:
    """Return by how much the loss falls at η, 2η, 4η, …, as far as it falls, or until next to nothing of it is left."""
    start = _loss(valid.logits, valid.y)
    lowest = start
    loss = _loss(valid.logits - eta * change, valid.y)
    while WORTH * start < loss < lowest:
        lowest = loss
        eta *= 2
        loss = _loss(valid.logits - eta * change, valid.y)
    return start - lowest.minimum(loss)


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    """The mean loss, summed in float64."""
    log_p = over_classes(torch.log_softmax, logits)  # [m, C]
    losses = -log_p.gather(1, y[:, None])
    return losses.double().mean()

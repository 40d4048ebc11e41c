"""Rules that match an average of the samples: their mean gradient, the descent of a loss, or their median."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from raypkg.coresets.gradients import HeadView, over_classes
from raypkg.coresets.solvers import (
    AT_ONCE,
    BLOCK,
    STABLE,
    BatchAtoms,
    MeanAtoms,
    SampleAtoms,
    batch_means,
    largest,
    largest_bounded,
    matching_pursuit,
    spanned_pursuit,
)
from raypkg.data.coreset import Coreset

from . import coreset

SPARSE = 4  # computing one gain in four by itself takes about as long as computing all of them at once
TOGETHER = 16  # samples added a step where there are more of them than numbers in a gradient
WORTH = 0.01  # GLISTER's loss must fall further by this share for another doubling of η
CLOSE = 1e-9  # a step of the geometric median below this share of the spread is rounding
# Printed in the paper: trained with the weights, selected again every R = 20 epochs, λ‖w‖².
PUBLISHED = {
    "weighted": True, "every_epochs": 20, "options.lam": 0.5, "options.eps": 1e-10, "options.relative": False,
}  # fmt: skip
PER_CLASS = {**PUBLISHED, "balanced": True, "options.normalise": False}  # and w = k·v


@coreset("gradmatch", source="arXiv:2103.00123", published=PER_CLASS)
def gradmatch(
    view: HeadView,
    budget: int,
    *,
    target: HeadView | None = None,
    lam: Annotated[float, Field(ge=0)] = 0.5,
    eps: Annotated[float, Field(gt=0)] = 1e-10,
    relative: bool = True,
    normalise: bool = True,
) -> Coreset:
    """Match the mean gradient by orthogonal matching pursuit with non-negative weights.

        v = argmin ‖Σ_{i∈S} v_i g_i − ḡ‖² + λ‖ḡ‖²‖v‖²,  v ≥ 0,  |S| ≤ k        w = k·v / Σv

    The gradient of the coreset's objective, mean(w · loss), is Σ v_i g_i / Σv, in the direction of ḡ. A λ that did not
    shrink with ‖ḡ‖² would outweigh the match late in training, and weights k·v would then vanish. If the pursuit needs
    fewer than k samples, those that correlate most with ḡ fill the budget at weight 0; if ḡ cannot be matched at all,
    every weight is 1.

    Args:
        view: the samples; the chosen gradients are matched in float64.
        budget: k.
        target: the samples whose mean gradient is ḡ; None = the view.
        lam: λ.
        eps: stop when the error is at most this share of ‖ḡ‖².
        relative: whether λ is in units of ‖ḡ‖²; false = λ‖v‖², as published, and one sample a step.
        normalise: whether the mean weight is 1; false = w = k·v, as published, with which the gradient also has the
            length of ḡ. It is often several times shorter, because the picks have larger gradients than most samples.

    Differs from the paper: the mean weight is 1, λ and ε are relative to ‖ḡ‖², and an atom whose weight would turn
    negative gives its place back. With a budget beyond the C(D+1) numbers of a gradient, ``TOGETHER`` samples are added
    a step; the error of the match, some 1e-4 ‖ḡ‖² there, is then within 2 % of that of one a step.
    """
    mean = mean_gradient(view if target is None else target)
    energy = mean.square().sum()
    penalty = lam * float(energy) if relative else lam
    if budget > mean.numel() and view.norms().square().topk(budget).values.sum() < STABLE * penalty:
        together = TOGETHER if relative else 1
        chosen, v = spanned_pursuit(view, mean, budget, lam=penalty, eps=eps, together=together)
    else:
        few = budget <= view.num_classes + view.width  # cached inner products then take no more room than the view
        kind = SampleAtoms if few else BatchAtoms
        atoms = kind(view, torch.arange(len(view), device=mean.device), mean, budget)
        chosen, v = matching_pursuit(atoms, energy, budget, lam=penalty, eps=eps)
    indices = chosen
    if len(chosen) < budget:
        aims = view.project(mean.to(view.features)).index_fill(0, chosen, -torch.inf)
        indices = torch.cat([chosen, largest(aims, budget - len(chosen))])
    if not len(chosen):
        return Coreset.uniform(indices)
    if normalise:
        v = v / v.sum()
    weights = torch.zeros(budget, device=v.device)
    weights[: len(chosen)] = budget * v
    return Coreset(indices, weights)


@coreset("gradmatchpb", source="arXiv:2103.00123", by_class=False, published=PUBLISHED)
def gradmatchpb(
    view: HeadView,
    budget: int,
    *,
    rng: torch.Generator,
    target: HeadView | None = None,
    batch_size: Annotated[int, Field(ge=1)] = 32,
    lam: Annotated[float, Field(ge=0)] = 0.0,
    eps: Annotated[float, Field(gt=0)] = 1e-10,
    relative: bool = True,
) -> Coreset:
    """Match the mean gradient by the mean gradients ḡ_B of batches, drawn once at random, instead of samples.

        v = argmin ‖Σ_{B∈S} v_B ḡ_B − ḡ‖² + λ‖ḡ‖²‖v‖²,  v ≥ 0,  Σ_{B∈S} |B| = k        w_i = k·v_B / |B|,  i ∈ B

    The gradient of the coreset's objective, mean(w · loss) = Σ_B (w_B |B| / k) · (mean loss of B), is Σ v_B ḡ_B ≈ ḡ.
    The last batch is cut to what is left of the budget, and the chosen batches, as they are then, are weighted once
    more. Batches mix the classes, whatever ``select.balanced`` says: within one class, the budget would often be less
    than a batch. If the pursuit needs fewer than k samples, the batches that correlate most with ḡ fill the budget; if
    ḡ cannot be matched at all, every weight is 1. Many times faster than gradmatch.

    Args:
        view: the samples.
        budget: k.
        rng: draws the batches.
        target: the samples whose mean gradient is ḡ; None = the view.
        batch_size: samples in a batch; the last one has what is left over.
        lam: λ; 0 by default, as in the released code.
        eps: stop when the error is at most this share of ‖ḡ‖².
        relative: whether λ is in units of ‖ḡ‖²; false = λ‖v‖², as published.

    Differs from the paper: λ and ε are relative to ‖ḡ‖², and a batch whose weight would turn negative gives its place
    back.
    """
    n = len(view)
    order = torch.randperm(n, generator=rng).to(view.y.device)
    batches = order.split(batch_size)
    batch = torch.empty_like(order)  # the batch of each sample [n]
    batch[order] = torch.arange(n, device=order.device) // batch_size

    wanted = math.ceil(budget / batch_size)
    numbers = view.num_classes * (view.width + 1)
    small = len(batches) * numbers <= n * (view.num_classes + view.width)  # all mean gradients, spelt out
    whole: BatchAtoms
    if small:
        means = batch_means(view, order, batch_size)
        of_view = batch.bincount().double() @ means / n
        mean = of_view.view(view.num_classes, -1) if target is None else mean_gradient(target)
        whole = MeanAtoms(means, mean)
    else:
        mean = mean_gradient(view if target is None else target)
        whole = BatchAtoms(view, batch, mean, wanted * batch_size)
    penalty = lam * float(whole.energy) if relative else lam
    best, _ = matching_pursuit(whole, whole.energy, wanted, lam=penalty, eps=eps)
    ranked = torch.cat([batches[b] for b in whole.ranked(best)])
    indices = ranked[:budget]

    left, place = batch[indices].unique(return_inverse=True)  # the place of each pick's batch among the chosen ones [k]
    if small:
        last = place[-1]  # the one that was cut
        means = means[left]
        means[last] = view[indices[place == last]].mean().flatten()
        cut: BatchAtoms = MeanAtoms(means, mean)
    else:
        cut = BatchAtoms(view[indices], place, mean, budget)
    chosen, v = matching_pursuit(cut, cut.energy, len(cut), lam=penalty, eps=eps)
    if not len(chosen):
        return Coreset.uniform(indices)
    totals = v.new_zeros(len(cut))  # v_B, 0 where B was not chosen again
    totals[chosen] = v
    shares = totals / place.bincount()  # v_B / |B|
    weights = budget * shares[place]
    return Coreset(indices, weights.float())


def mean_gradient(samples: HeadView) -> Tensor:
    """Return ḡ in float64 [C, D+1]: sums of blocks are, which is as exact as the gradients themselves."""
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(samples), BLOCK):
        total = total + samples[start : start + BLOCK].sum().double()
    return total / len(samples)


# η is the learning rate in the paper; here it is that of its comparison on CIFAR-10.
@coreset("glister", source="arXiv:2012.10630", published={"every_epochs": 20, "options.eta": 0.01})
def glister(
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
        budget: k.
        valid: the samples of L_val; None = the view.
        eta: η, which is not doubled then, as published; None = from the curvature.
        rounds: refreshes at the first η, at the start of equal parts of the budget; from the budget on, one before
            every choice.
        doublings: of η, at most.

    Differs from the paper: θ_S moves the last layer only; η is derived, where the paper takes the learning rate, at
    which the sum of hundreds of gradients leads far beyond the minimum.
    """
    valid = view.arranged() if valid is None else valid.arranged()
    everyone = torch.arange(len(view), device=view.y.device)
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
    """Return the k samples of the largest gains <∇L_val, g_i> among those ``left``, and the gains, descending.

    All n gains from ∇L_val take (m + n)·C·D multiplications. One by itself, the mean of <g_i, g_j> over the m
    validation samples, takes m(C + D). With many classes few have to be computed, by the bound

        <∇L_val, g_i> = mean_j <p_i − e_i, p_j − e_j> (<h_i, h_j> + 1) ≤ ‖p_i − e_i‖ Σ_d |[h_i; 1]_d| t_d

    with t = mean_j ‖p_j − e_j‖ |[h_j; 1]|, which is close if features are not negative and errors alike. If errors
    differ in size, few of the n have to be computed from ∇L_val, by the bound ‖∇L_val‖·‖g_i‖.
    """
    few = view.num_classes * view.width // (view.num_classes + view.width)  # gains that cost no more than ∇L_val
    if few >= max(k, AT_ONCE):
        errors = valid.residual.norm(dim=1) / len(valid)  # ‖p_j − e_j‖ / m [m]
        t = errors @ valid.features.abs()  # of the features [D]
        reach = view.features.abs() @ t + errors.sum()  # Σ_d |[h_i; 1]_d| t_d [n]
        bounds = view.residual.norm(dim=1) * reach * (1 + view.rounding)
        best = largest_bounded(bounds[left], lambda block: view[left[block]].inner(valid).mean(dim=1), k, at_most=few)
        if best:
            return left[best[0]], best[1]
    steep = valid.mean()  # ∇L_val
    bounds = view.norms()[left] * steep.norm() * (1 + view.rounding)
    best = largest_bounded(bounds, lambda block: view[left[block]].project(steep), k, at_most=len(left) // SPARSE)
    if best:
        return left[best[0]], best[1]
    gains = view.project(steep)[left]
    positions = largest(gains, k)
    return left[positions], gains[positions]


def safe_rate(valid: HeadView, change: Tensor, slope: Tensor) -> float:
    """Return an η at which the mean loss falls by at least η/2 · slope in θ − η·M, half of what the slope promises.

    The loss's second derivative in η is the mean variance of a = M [h; 1] under the model's probabilities. That is at
    most V = mean (max_c a_c − min_c a_c)² / 4 wherever the head is moved to, so η = slope / V falls by as much. η is
    doubled from there while it still does. ``change`` is a [m, C], ``slope`` is <∇L, M> > 0.
    """
    spread = change.amax(dim=1) - change.amin(dim=1)
    bound = spread.double().square().mean() / 4  # V
    start = _loss(valid.logits, valid.y)
    eta = float(slope / bound)
    while _loss(valid.logits - 2 * eta * change, valid.y) <= start - eta * slope:
        eta *= 2
    return eta


def _refreshed(view: HeadView, valid: HeadView, static: Tensor, eta: float, rounds: int) -> tuple[Tensor, Tensor]:
    """Return the picks, those at θ first, and how they change the validation logits at η = 1."""
    parts = static.tensor_split(min(rounds, len(static)))
    chosen = parts[0]
    change = valid.along(view[chosen])
    left = torch.ones_like(view.y, dtype=torch.bool)
    for part in parts[1:]:
        left[chosen] = False
        moved = valid.shifted(-eta * change)
        best, _ = steepest(view, left.nonzero()[:, 0], moved, len(part))
        chosen = torch.cat([chosen, best])
        change = change + valid.along(view[best])
    return chosen, change


def _largest_drop(valid: HeadView, change: Tensor, eta: float) -> Tensor:
    """Return by how much the loss falls at η, 2η, 4η, …, until it rises or next to nothing of it is left."""
    start = _loss(valid.logits, valid.y)
    lowest = start
    loss = _loss(valid.logits - eta * change, valid.y)
    while WORTH * start < loss < lowest:
        lowest = loss
        eta *= 2
        loss = _loss(valid.logits - eta * change, valid.y)
    return start - lowest.minimum(loss)


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss, summed in float64."""
    log_p = over_classes(torch.log_softmax, logits)  # [m, C]
    losses = -log_p.gather(1, y[:, None])
    return losses.double().mean()


@coreset("gm", source="arXiv:2504.00564")
def gm(view: HeadView, budget: int, *, unit: bool = True, iterations: Annotated[int, Field(ge=1)] = 100) -> Coreset:
    """Herd towards the geometric median: choose so that the mean of the chosen features approaches it.

        m = argmin_z Σ_i ‖φ_i − z‖        i_t = argmax_{i∉S} <θ_t, φ_i>,   θ_0 = m,   θ_{t+1} = θ_t + m − φ_{i_t}

    Up to half of the samples may be arbitrarily wrong before the median is. With features of unit length (``unit``)
    each choice is the one that brings the mean of the chosen nearest to m, and none is chosen for its length. O(nD)
    time a step.

    Differs from the paper: φ are the features of the view's model, where the paper has those of a large pre-trained
    encoder, and the median is that of all samples of the class, not of a random part.
    """
    features = view.features.double()
    if unit:
        features = torch.nn.functional.normalize(features, dim=1)
    median = geometric_median(features, iterations)
    aim = median.clone()  # θ
    free = torch.ones_like(view.y, dtype=torch.bool)
    chosen = []
    for _ in range(budget):
        alike = (features @ aim).where(free, -torch.inf)
        best = int(alike.argmax())
        free[best] = False
        chosen.append(best)
        aim = aim + median - features[best]
    return Coreset.uniform(torch.tensor(chosen))


def geometric_median(points: Tensor, iterations: int) -> Tensor:
    """Return argmin_z Σ_i ‖x_i − z‖ by Weiszfeld's algorithm, from the mean on [D].

    Each step is the mean weighted by 1 / ‖x_i − z‖, with distances of at least a rounding error so that z may be one of
    the points.
    """
    centre = points.mean(dim=0)
    spread = (points - centre).norm(dim=1).mean()
    if not spread:
        return centre
    for _ in range(iterations):
        distances = (points - centre).norm(dim=1).clamp(min=float(CLOSE * spread))
        pull = 1 / distances
        moved = pull @ points / pull.sum()
        step = (moved - centre).norm()
        centre = moved
        if step <= CLOSE * spread:
            break
    return centre

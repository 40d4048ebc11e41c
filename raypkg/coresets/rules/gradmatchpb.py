"""GradMatch over mini-batches: whole random batches are chosen and weighted, which is many times faster."""

import math
from typing import Annotated

import torch
from pydantic import Field

from raypkg.coresets.atoms import BatchAtoms
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.solvers import matching_pursuit
from raypkg.data.coreset import Coreset

from . import coreset
from .gradmatch import mean_gradient


@coreset("gradmatchpb", source="arXiv:2103.00123", by_class=False)
def select(
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

    so the gradient of the coreset's objective, mean(w · loss) = Σ_B (w_B |B| / k) · (mean loss of B), is
    Σ v_B ḡ_B ≈ ḡ. The last batch is cut to what is left of the budget, and the chosen batches, as they are then, are
    weighted once more. Batches mix the classes, whatever ``select.balanced`` says: within one class, the budget would
    often be less than a batch. Where the pursuit needs fewer than k samples, the batches that correlate most with ḡ
    fill the budget; if ḡ cannot be matched at all, every weight is 1.

    Args:
        view: the samples.
        budget: k.
        rng: draws the batches.
        target: the samples whose mean gradient is ḡ; the view itself if None.
        batch_size: samples in a batch; the last one has what is left over.
        lam: λ, the penalty on the weights; none by default, as in the released code.
        eps: stop when the error is at most this share of ‖ḡ‖².
        relative: whether λ is in units of ‖ḡ‖²; false = λ‖v‖², as published.

    Differs from the paper: λ and ε are relative to ‖ḡ‖², and a batch whose weight would turn negative gives its place
    back.
    """
    mean = mean_gradient(view if target is None else target)
    n = len(view)
    order = torch.randperm(n, generator=rng)
    batches = order.split(batch_size)
    batch = torch.empty_like(order)  # which batch each sample is in [n]
    batch[order] = torch.arange(n) // batch_size

    wanted = math.ceil(budget / batch_size)
    whole = BatchAtoms(view, batch, mean, wanted * batch_size)
    penalty = lam * float(whole.energy) if relative else lam
    best, _ = matching_pursuit(whole, whole.energy, wanted, lam=penalty, eps=eps)
    ranked = torch.cat([batches[b] for b in whole.ranked(best)])
    indices = ranked[:budget]

    _, place = batch[indices].unique(return_inverse=True)  # which of the chosen batches each pick is in [k]
    cut = BatchAtoms(view[indices], place, mean, budget)
    chosen, v = matching_pursuit(cut, cut.energy, len(cut), lam=penalty, eps=eps)
    if not len(chosen):
        return Coreset.uniform(indices)
    totals = v.new_zeros(len(cut))  # v_B, 0 where B was not chosen again
    totals[chosen] = v
    shares = totals / place.bincount()  # v_B / |B|
    weights = budget * shares[place]
    return Coreset(indices, weights.float())

"""GradMatch: a weighted subset whose gradient is the gradient of all samples."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from raypkg.coresets.atoms import BatchAtoms, SampleAtoms
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.solvers import matching_pursuit
from raypkg.data.coreset import Coreset

from . import coreset

BLOCK = 4096  # samples that are in float64 at a time


@coreset("gradmatch", source="arXiv:2103.00123")
def select(
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

    so the gradient of the coreset's objective, mean(w · loss), is Σ v_i g_i / Σv, in the direction of ḡ. A λ that did
    not shrink with ‖ḡ‖² would outweigh the match late in training, and weights k·v would then vanish. Where the pursuit
    needs fewer than k samples, those that correlate most with ḡ fill the budget at weight 0; if ḡ cannot be matched at
    all, every weight is 1.

    Args:
        view: the samples; the chosen gradients are matched in float64.
        budget: k.
        target: the samples whose mean gradient is ḡ; the view itself if None.
        lam: λ, the penalty on the weights.
        eps: stop when the error is at most this share of ‖ḡ‖².
        relative: whether λ is in units of ‖ḡ‖²; false = λ‖v‖², as published.
        normalise: whether the mean weight is 1; false = w = k·v, as published, with which the gradient has the length
            of ḡ too. That is often several times shorter, because the picks have larger gradients than most samples.

    Differs from the paper: the mean weight is 1, λ and ε are relative to ‖ḡ‖², and an atom whose weight would turn
    negative gives its place back.
    """
    mean = mean_gradient(view if target is None else target)
    few = budget <= view.num_classes + view.width  # inner products then take no more room than the view
    kind = SampleAtoms if few else BatchAtoms
    each_by_itself = torch.arange(len(view))
    atoms = kind(view, each_by_itself, mean, budget)
    penalty = lam * float(atoms.energy) if relative else lam
    chosen, v = matching_pursuit(atoms, atoms.energy, budget, lam=penalty, eps=eps)
    indices = atoms.ranked(chosen)[:budget]
    if not len(chosen):
        return Coreset.uniform(indices)
    if normalise:
        v = v / v.sum()
    weights = torch.zeros(budget)
    weights[: len(chosen)] = budget * v
    return Coreset(indices, weights)


def mean_gradient(samples: HeadView) -> Tensor:
    """Return the gradient to match, summed in float64 [C, D+1]."""
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(samples), BLOCK):
        block = samples[start : start + BLOCK].double()
        total = total + block.sum()
    return total / len(samples)

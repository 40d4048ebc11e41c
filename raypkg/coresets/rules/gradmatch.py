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
) -> Coreset:
    """Match the mean gradient by orthogonal matching pursuit with non-negative weights.

        v = argmin ‖Σ_{i∈S} v_i g_i − ḡ‖² + λ‖v‖²,  v ≥ 0,  |S| ≤ k        w = k·v

    so the gradient of the coreset's objective, mean(w · loss), is Σ v_i g_i ≈ ḡ. Equal gradients get
    w = ‖ḡ‖² / (‖ḡ‖² + λ/k), that is 1 but for the penalty. Where the pursuit needs fewer than k samples, those that
    correlate most with ḡ fill the budget at weight 0; if ḡ cannot be matched at all, every weight is 1.

    Args:
        view: the samples; the chosen gradients are matched in float64.
        budget: k.
        target: the samples whose mean gradient is ḡ; the view itself if None.
        lam: λ, the penalty on the weights.
        eps: stop when the error is at most this share of ‖ḡ‖².

    Differs from the paper: ε is relative to ‖ḡ‖², and an atom whose weight would turn negative gives its place back.
    """
    mean = mean_gradient(view if target is None else target)
    few = budget <= view.num_classes + view.width  # inner products then take no more room than the view
    kind = SampleAtoms if few else BatchAtoms
    each_by_itself = torch.arange(len(view))
    atoms = kind(view, each_by_itself, mean, budget)
    chosen, v = matching_pursuit(atoms, atoms.energy, budget, lam=lam, eps=eps)
    indices = atoms.ranked(chosen)[:budget]
    if not len(chosen):
        return Coreset.uniform(indices)
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

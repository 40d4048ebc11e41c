"""GLISTER: greedily choose the samples whose gradient step lowers the validation loss most."""

from typing import Annotated

import torch
from pydantic import Field

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
    eta: Annotated[float, Field(gt=0)] = 0.01,
    rounds: Annotated[int, Field(ge=1)] = 20,
) -> Coreset:
    """Add the samples with the largest <∇L_val(θ_S), g_i>, refreshing ∇L_val along the way.

        θ_S = θ − η Σ_{i∈S} g_i

    Moving the head moves the validation logits linearly, so ∇L_val(θ_S) is exact without a forward pass.

    Args:
        view: the samples; their own gradients stay those at θ.
        budget: how many to choose.
        valid: the samples of L_val; the view itself if None.
        eta: η, the size of the step.
        rounds: refreshes, at the start of equal parts of the budget; from the budget on, one before every choice.

    Differs from the paper: θ_S moves the last layer only.
    """
    valid = view if valid is None else valid
    chosen = torch.empty(0, dtype=torch.int64)
    for share in torch.arange(budget).tensor_split(min(rounds, budget)):
        step = -eta * view[chosen].sum()  # θ_S − θ [C, D+1]
        gradient = valid.moved(step).mean()  # ∇L_val(θ_S) [C, D+1]
        gain = view.project(gradient)  # [n]
        gain = gain.index_fill(0, chosen, -torch.inf)
        best = largest(gain, len(share))
        chosen = torch.cat([chosen, best])
    return Coreset.uniform(chosen)

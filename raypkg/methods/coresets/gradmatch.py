"""GradMatch: a weighted subset whose gradient is the gradient of all samples."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.methods.coreset import Coreset
from raypkg.methods.coresets import coreset
from raypkg.methods.gradients import HeadView
from raypkg.methods.solvers import largest, matching_pursuit


@coreset("gradmatch", source="arXiv:2103.00123")
def select(
    view: HeadView,
    budget: int,
    *,
    valid: HeadView | None = None,
    lam: Annotated[float, Field(ge=0)] = 0.5,
    eps: Annotated[float, Field(gt=0)] = 1e-10,
    target: Literal["train", "valid"] = "train",
) -> Coreset:
    """Match the mean gradient by orthogonal matching pursuit with non-negative weights.

        v = argmin ‖Σ_{i∈S} v_i g_i − ḡ‖² + λ‖v‖²,  v ≥ 0,  |S| ≤ k        w = k·v

    so the gradient of the coreset's objective, mean(w · loss), is Σ v_i g_i ≈ ḡ. Equal gradients get
    w = ‖ḡ‖² / (‖ḡ‖² + λ/k), that is 1 but for the penalty. Where the pursuit needs fewer than k samples, those that
    correlate most with ḡ fill the budget at weight 0; if ḡ cannot be matched at all, every weight is 1.

    Args:
        view: the samples; gradients are matched in float64.
        budget: k.
        valid: samples whose mean gradient is ḡ if ``target`` is "valid".
        lam: λ, the penalty on the weights.
        eps: stop when the error is at most this share of ‖ḡ‖².
        target: whose mean gradient to match.

    Raises:
        UserError: the target is "valid" and there are no validation samples.

    Differs from the paper: ε is relative to ‖ḡ‖², and an atom whose weight would turn negative gives its place back.
    """
    mean = _mean_gradient(view, valid, target)  # [C, D+1]
    exact = view.double()
    correlation = exact.project(mean)  # [n]
    atoms, v = matching_pursuit(exact.inner_with, correlation, mean.square().sum(), budget, lam=lam, eps=eps)
    indices = _filled(atoms, correlation, budget)
    if not len(atoms):
        return Coreset.uniform(indices)
    weights = torch.zeros(budget)
    weights[: len(atoms)] = budget * v
    return Coreset(indices, weights)


def _mean_gradient(view: HeadView, valid: HeadView | None, target: str) -> Tensor:
    if target == "train":
        return view.double().mean()
    if valid is None:
        raise UserError("gradmatch option target = 'valid': there are no validation samples")
    return valid.double().mean()


def _filled(atoms: Tensor, correlation: Tensor, budget: int) -> Tensor:
    rest = correlation.index_fill(0, atoms, -torch.inf)
    return torch.cat([atoms, largest(rest, budget - len(atoms))])

"""LESS (arXiv:2402.04333): gradients of the adapters as Adam would use them, projected, at several checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from raypkg.core.errors import UserError

from .adapters import gradient_blocks
from .projection import Projection

BETA1 = 0.9
BETA2 = 0.999
EPSILON = 1e-8


class Moments(NamedTuple):
    """Adam's moments of one parameter, of its shape."""

    m: Tensor  # average gradient
    v: Tensor  # average squared gradient


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Moments]:
    """Return copies of the moments of a model's trained parameters, by name, on the CPU.

    Raises:
        UserError: the optimiser is not of Adam's kind, or has taken no step.
    """
    moments = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" not in state:
                kind = type(optimizer).__name__
                raise UserError(f"{kind} has no moments of {name}: LESS needs Adam or AdamW, after a step")
            moments[name] = Moments(*(state[key].to("cpu", copy=True) for key in ("exp_avg", "exp_avg_sq")))
    return moments


def preconditioned(gradients: Tensor, moments: Moments, betas: tuple[float, float] = (BETA1, BETA2)) -> Tensor:
    """Return (β1 m + (1 − β1) g) / sqrt(β2 v + (1 − β2) g² + ε) of each sample's gradient, float [b, p].

    >>> preconditioned(torch.tensor([[1.0]]), Moments(torch.tensor([1.0]), torch.tensor([1.0])))
    tensor([[1.]])
    """
    beta1, beta2 = betas
    m, v = (each.to(gradients).flatten() for each in moments)
    mean = (1 - beta1) * gradients + beta1 * m
    square = (1 - beta2) * gradients.square() + beta2 * v
    return mean / (square + EPSILON).sqrt()


def gradient_rows(
    model: nn.Module,
    losses: Callable[[], Tensor],
    projection: Projection,
    moments: Mapping[str, Moments] | None = None,
    betas: tuple[float, float] = (BETA1, BETA2),
) -> Tensor:
    """Return the projected gradients of a batch's samples at length 1, float32 [b, d].

    Blocks of parameters are preconditioned and projected one by one, so b × p numbers are never in memory.

    Args:
        model: see ``gradient_blocks``.
        losses: see there too.
        projection: to d numbers.
        moments: Adam's, by name of parameter, for samples to select from; None = the plain gradient, for a target.
        betas: Adam's β1 and β2.
    """
    total: Any = 0
    start = 0
    for name, block in gradient_blocks(model, losses):
        gradients = block if moments is None else preconditioned(block, moments[name], betas)
        total = total + projection(gradients.float(), start)
        start += block.shape[1]
    return normalize(total, dim=1)


def over_checkpoints(rows: Sequence[Tensor], rates: Sequence[float]) -> Tensor:
    """Return rows whose inner products are Σ_t η_t <r_t, r'_t>: r_t · sqrt(η_t) side by side, float [n, T·d].

    The rates are normalised to Σ η_t = 1, so rows of length 1 give rows of length 1.
    """
    total = sum(rates)
    return torch.cat([part * (rate / total) ** 0.5 for part, rate in zip(rows, rates, strict=True)], dim=1)

"""AGENT's adaptive gradient correction: a control variate for sparse training (arXiv:2301.03573).

    ĉ = Cov_B(ℓ_B(θ), ℓ_B(θ̃)) / Var_B(ℓ_B(θ̃))        c ← (1 − α)·c + α·ĉ        before θ̃ is refreshed
    θ̃ ← θ,   g̃ = the full gradient at θ̃
    step with   ∇ℓ_B(θ) − γc·(∇ℓ_B(θ̃) − g̃)

c = 0 is SGD, γc = 1 is SVRG.
"""

import torch
from torch import Tensor


def coefficient(current: Tensor, snapshot: Tensor) -> float:
    """Return ĉ of batch losses at the current and at the snapshot's weights; 0 where the latter are all the same.

    Args:
        current: ℓ_B(θ), [batches].
        snapshot: ℓ_B(θ̃), [batches].

    >>> coefficient(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 6.0]))
    0.5
    """
    snapshot = snapshot.double()
    centred = snapshot - snapshot.mean()
    variance = centred @ centred  # times the number of batches, as is the covariance below
    if not variance > 0:  # nor where it is NaN
        return 0.0
    covariance = current.double() @ centred  # centring one of the two is enough
    return (covariance / variance).item()


def smoothed(c: float, estimate: float, alpha: float) -> float:
    """Return (1 − α)·c + α·ĉ."""
    return (1 - alpha) * c + alpha * estimate


def correct(gradients: list[Tensor], snapshot: list[Tensor], full: list[Tensor], damped: float) -> None:
    """Subtract γc·(∇ℓ_B(θ̃) − g̃) from the gradients, in place.

    Args:
        gradients: ∇ℓ_B(θ), one tensor a parameter.
        snapshot: ∇ℓ_B(θ̃).
        full: g̃.
        damped: γc.
    """
    difference = torch._foreach_sub(full, snapshot)  # of all tensors at once
    torch._foreach_add_(gradients, difference, alpha=damped)


def cosine_similarity(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the cosine of the angle between two lists of tensors, 0 where one is zero."""
    lengths = (_inner(a, a) * _inner(b, b)).sqrt()
    cosine = _inner(a, b) / lengths
    return cosine.nan_to_num(0.0).item()


def _inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Return Σ⟨a, b⟩ over all tensors, float64.

    Not by BLAS: its product depends on where tensors lie in memory, and DDP moves gradients after its first step.
    """
    products = torch._foreach_mul(a, b)
    sums = [product.sum(dtype=torch.float64) for product in products]
    return torch.stack(sums).sum()

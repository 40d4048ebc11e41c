"""AGENT's adaptive gradient correction: a control variate for sparse training (arXiv:2301.03573).

    θ̃ ← θ,   g̃ = the full gradient at θ̃
    step with   ∇ℓ_B(θ) − a·(∇ℓ_B(θ̃) − g̃)        a = γc

a = 0 is SGD, a = 1 is SVRG. Of the variance that batches give a gradient, the correction leaves the share

    1 − 2aρs + a²s²        ρ the correlation of ∇ℓ_B(θ) and ∇ℓ_B(θ̃), s the ratio of their deviations

which is least, 1 − ρ², at a = ρ/s = Cov / Var(∇ℓ_B(θ̃)).
"""

from collections.abc import Sequence

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


def spread(
    current: list[Tensor], snapshot: list[Tensor], current_before: list[Tensor], snapshot_before: list[Tensor]
) -> Tensor:
    """Return estimates of Var(∇ℓ_B(θ)), of the covariance with ∇ℓ_B(θ̃), and of Var(∇ℓ_B(θ̃)), by layer: [3, layers].

    Half the products of the differences from one step to the next: θ moves little between them, so the drift of its
    mean gradient, which is no variance of batches, cancels.

    Args:
        current: ∇ℓ_B(θ), one tensor a layer, that is, a parameter.
        snapshot: ∇ℓ_B(θ̃), likewise.
        current_before: ∇ℓ_B(θ) of the step before.
        snapshot_before: ∇ℓ_B(θ̃) of the step before.
    """
    moved = torch._foreach_sub(current, current_before)
    moved_at_snapshot = torch._foreach_sub(snapshot, snapshot_before)
    variance = _inner(moved, moved)
    covariance = _inner(moved, moved_at_snapshot)
    variance_at_snapshot = _inner(moved_at_snapshot, moved_at_snapshot)
    return torch.stack([variance, covariance, variance_at_snapshot]) / 2


def variance_left(moments: Tensor, weights: Tensor) -> Tensor:
    """Return the variance after the correction and that before it, over all layers: their ratio is what is left, [2].

    Args:
        moments: of ``spread``, [3, layers].
        weights: a of each layer, [layers].

    >>> after, before = variance_left(torch.tensor([[4.0], [3.0], [9.0]]), torch.tensor([1 / 3]))
    >>> round((after / before).item(), 3)  # 1 − ρ², ρ = 3 / √(4·9)
    0.75
    """
    variance, covariance, variance_at_snapshot = moments
    after = variance - 2 * weights * covariance + weights**2 * variance_at_snapshot
    return torch.stack([after.sum(), variance.sum()])


def correct(gradients: list[Tensor], snapshot: list[Tensor], full: list[Tensor], weights: Tensor) -> None:
    """Subtract a·(∇ℓ_B(θ̃) − g̃) from the gradients, in place.

    Args:
        gradients: ∇ℓ_B(θ), one tensor a layer.
        snapshot: ∇ℓ_B(θ̃).
        full: g̃.
        weights: a of each layer, [layers].
    """
    difference = torch._foreach_sub(full, snapshot)  # of all tensors at once
    by_layer = [weight.to(gradient.dtype) for weight, gradient in zip(weights, gradients, strict=True)]
    torch._foreach_mul_(difference, by_layer)
    torch._foreach_add_(gradients, difference)


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return ⟨a, b⟩ of each layer, float64 [layers].

    Not by BLAS: its product depends on where tensors lie in memory, and DDP moves gradients after its first step.
    """
    products = torch._foreach_mul(list(a), list(b))
    sums = [product.sum(dtype=torch.float64) for product in products]
    return torch.stack(sums)

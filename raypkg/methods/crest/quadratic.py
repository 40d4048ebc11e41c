"""The local model of the loss: quadratic in how far the weights have moved, with smoothed gradient and curvature.

    F(δ) = L(w_l) + ḡᵀδ + ½ δᵀ diag(H̄) δ,      δ = w − w_l                            arXiv:2306.01244, section 4.2

Vectors hold all parameters that the model looks at, one after another, float32 [p].
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raypkg.core.errors import UserError

BETA1, BETA2 = 0.9, 0.999  # the paper's


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Return the entries of all tensors as one vector, float32 [p]."""
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors])


def gradient_of(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return ∇L, [p]."""
    return flat(torch.autograd.grad(loss, parameters, materialize_grads=True))


def hessian_diagonal(loss: Tensor, parameters: Sequence[Tensor], rng: torch.Generator) -> Tensor:
    """Return Hutchinson's estimate of the Hessian's diagonal, z ⊙ Hz with random signs z, [p]: a double backward pass.

    Its mean over z is the diagonal, and where the Hessian is diagonal, every estimate is exact.

    Args:
        loss: a scalar that depends on the parameters.
        parameters: with p entries in all.
        rng: draws z, on the CPU.
    """
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    signs = [torch.randint(2, p.shape, generator=rng).to(p).mul_(2).sub_(1) for p in parameters]
    slope = torch.stack([(g * z).sum() for g, z in zip(gradient, signs, strict=True)]).sum()  # zᵀ∇L
    products = torch.autograd.grad(slope, parameters, materialize_grads=True)
    return flat(z * product for z, product in zip(signs, products, strict=True))


@dataclass(frozen=True)
class MovingMoments:
    """Exponential means of gradients, and of squared Hessian diagonals, over the updates so far.

    Args:
        first: (1−β1) Σ_s β1^(l−s) g_s, [p].
        second: (1−β2) Σ_s β2^(l−s) diag(H_s)², [p]; None where no curvature is looked at.
        updates: l.
        betas: (β1, β2); (0, 0) = the latest only.
    """

    first: Tensor
    second: Tensor | None
    updates: int = 0
    betas: tuple[float, float] = (BETA1, BETA2)

    def updated(self, gradient: Tensor, diagonal: Tensor | None) -> "MovingMoments":
        """Return the means with one more gradient and diagonal."""
        second = None
        if self.second is not None and diagonal is not None:
            second = self.betas[1] * self.second + (1 - self.betas[1]) * diagonal.square()
        return MovingMoments(
            self.betas[0] * self.first + (1 - self.betas[0]) * gradient, second, self.updates + 1, self.betas
        )

    def to(self, device: torch.device) -> "MovingMoments":
        """Return the means on a device."""
        second = None if self.second is None else self.second.to(device)
        return MovingMoments(self.first.to(device), second, self.updates, self.betas)

    @property
    def gradient(self) -> Tensor:
        """ḡ = EMA_β1(g) / (1 − β1^l), [p]."""
        return self.first / (1 - self.betas[0] ** self.updates)

    @property
    def diagonal(self) -> Tensor | None:
        """H̄ = sqrt(EMA_β2(diag(H)²) / (1 − β2^l)), [p]: never negative."""
        if self.second is None:
            return None
        return (self.second / (1 - self.betas[1] ** self.updates)).sqrt()


def predicted(loss: float, gradient: Tensor, diagonal: Tensor | None, moved: Tensor) -> float:
    """Return F(δ); without a diagonal, the model is linear.

    Args:
        loss: L(w_l).
        gradient: ḡ [p].
        diagonal: H̄ [p], or None.
        moved: δ [p].
    """
    bend = 0.0 if diagonal is None else 0.5 * float(diagonal @ moved.square())
    return loss + float(gradient @ moved) + bend


def relative_error(model: float, loss: float) -> float:
    """Return ρ = |F − L| / L, how far the model is off.

    A model that is not finite, or any but an exact one of a loss of 0, is infinitely far off.

    Raises:
        UserError: the loss is not finite.

    >>> relative_error(1.1, 1.0)
    0.10000000000000009
    """
    if not math.isfinite(loss):
        raise UserError(f"the loss became {loss} at a check of CREST's model: lower the learning rate")
    if loss == 0 or not math.isfinite(model):
        return 0.0 if model == loss else math.inf
    return abs(model - loss) / loss

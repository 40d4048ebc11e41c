"""The local model of the loss: quadratic in how far the weights have moved, with smoothed gradient and curvature.

    F(δ) = L(w_l) + ḡᵀδ + ½ δᵀ diag(H̄) δ,      δ = w − w_l                            arXiv:2306.01244, section 4.2

Vectors hold all parameters that the model covers, one after another, float32 [p].
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raypkg.core.errors import UserError

BETA1 = 0.9  # the paper's
BETA2 = 0.999


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Return the entries of all tensors as one vector, float32 [p]."""
    vectors = [tensor.detach().float().flatten() for tensor in tensors]
    return torch.cat(vectors)


def gradient_of(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return ∇L, [p]."""
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return flat(gradients)


def hessian_diagonal(loss: Tensor, parameters: Sequence[Tensor], rng: torch.Generator) -> Tensor:
    """Return Hutchinson's estimate of the Hessian's diagonal, z ⊙ Hz with random signs z, [p]: a double backward pass.

    Its mean over z is the diagonal, and where the Hessian is diagonal, every estimate is exact.

    Args:
        loss: a scalar that depends on the parameters.
        parameters: with p entries in all.
        rng: draws z, on the CPU.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    signs = [_random_signs(parameter, rng) for parameter in parameters]
    # H is never formed: the gradient of the scalar zᵀ∇L is Hz.
    slopes = [slope.sum() for slope in map(torch.mul, gradients, signs)]
    slope = torch.stack(slopes).sum()  # zᵀ∇L
    products = torch.autograd.grad(slope, parameters, materialize_grads=True)  # Hz
    return flat(map(torch.mul, signs, products))


def _random_signs(parameter: Tensor, rng: torch.Generator) -> Tensor:
    coins = torch.randint(2, parameter.shape, generator=rng)
    return coins.to(parameter).mul_(2).sub_(1)


@dataclass(frozen=True, eq=False)
class MovingMoments:
    """Exponential means of gradients, and of squared Hessian diagonals, over the updates so far.

    Args:
        first: (1−β1) Σ_s β1^(l−s) g_s, [p].
        second: (1−β2) Σ_s β2^(l−s) diag(H_s)², [p]; None where curvature is not modelled.
        updates: l.
        betas: (β1, β2); (0, 0) = the latest only.
    """

    first: Tensor
    second: Tensor | None
    updates: int = 0
    betas: tuple[float, float] = (BETA1, BETA2)

    @classmethod
    def none_yet(cls, order: int, *, smoothed: bool) -> "MovingMoments":
        """Return the moments before the first update: zeros, which take any shape."""
        zero = torch.zeros(())
        betas = (BETA1, BETA2) if smoothed else (0.0, 0.0)
        return cls(zero, zero if order == 2 else None, betas=betas)

    def updated(self, gradient: Tensor, diagonal: Tensor | None) -> "MovingMoments":
        """Return the means with one more gradient and diagonal."""
        beta1, beta2 = self.betas
        first = beta1 * self.first + (1 - beta1) * gradient
        second = None
        if self.second is not None and diagonal is not None:
            # A single draw of z estimates with noise of either sign: squared, it cannot cancel what curvature there is.
            squares = diagonal.square()
            second = beta2 * self.second + (1 - beta2) * squares
        return replace(self, first=first, second=second, updates=self.updates + 1)

    def to(self, device: torch.device) -> "MovingMoments":
        """Return the means on a device."""
        first = self.first.to(device)
        second = None
        if self.second is not None:
            second = self.second.to(device)
        return replace(self, first=first, second=second)

    @property
    def gradient(self) -> Tensor:
        """ḡ = EMA_β1(g) / (1 − β1^l), [p]."""
        beta1, _ = self.betas
        weight = 1 - beta1**self.updates  # of all gradients so far, as the mean began at zero
        return self.first / weight

    @property
    def diagonal(self) -> Tensor | None:
        """H̄ = sqrt(EMA_β2(diag(H)²) / (1 − β2^l)), [p]: never negative."""
        if self.second is None:
            return None
        _, beta2 = self.betas
        weight = 1 - beta2**self.updates
        return (self.second / weight).sqrt()


def predicted(loss: float, gradient: Tensor, diagonal: Tensor | None, moved: Tensor) -> float:
    """Return F(δ); without a diagonal, the model is linear.

    Args:
        loss: L(w_l).
        gradient: ḡ [p].
        diagonal: H̄ [p], or None.
        moved: δ [p].
    """
    slope = float(gradient @ moved)  # ḡᵀδ
    bend = 0.0
    if diagonal is not None:
        bend = 0.5 * float(diagonal @ moved.square())  # ½ δᵀ diag(H̄) δ
    return loss + slope + bend


def relative_error(model: float, loss: float) -> float:
    """Return ρ = |F − L| / L, how far the model is off.

    A model that is not finite is infinitely far off, and so is every model but an exact one where the loss is 0.

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

"""The local model of the loss, its relative error ρ, and T1, the steps between checks (arXiv:2306.01244, section 4.2).

    F(δ) = L(w_l) + ḡᵀδ + ½ δᵀ diag(H̄) δ,      δ = w − w_l

ḡ and H̄ are moving averages of gradients and of Hutchinson's estimates of the Hessian's diagonal. Vectors hold all
trained parameters, one after another, float32 [p].
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from raypkg.core.errors import UserError

BETAS = (0.9, 0.999)  # β1, β2 of the paper
Derive = Callable[[Tensor, Sequence[Tensor]], Tensor]  # (loss, parameters) → a derivative, linear in the loss [p]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Return the entries of all tensors as one vector, float32 [p]."""
    vectors = [tensor.detach().float().flatten() for tensor in tensors]
    return torch.cat(vectors)


def gradient_of(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return ∇L, [p]."""
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return flat(gradients)


def hessian_diagonal(loss: Tensor, parameters: Sequence[Tensor], draw: Callable[[], torch.Generator]) -> Tensor:
    """Return Hutchinson's estimate of the Hessian's diagonal, z ⊙ Hz with random signs z of a new generator, [p].

    Its mean over z is the diagonal. Where the Hessian is diagonal, every estimate is exact.
    """
    rng = draw()
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    signs = []
    for parameter in parameters:
        coins = torch.randint(2, parameter.shape, generator=rng)
        signs.append(coins.to(parameter).mul_(2).sub_(1))
    # H is never formed: the gradient of the scalar zᵀ∇L is Hz, at the cost of a second backward pass.
    slopes = [slope.sum() for slope in map(torch.mul, gradients, signs)]
    slope = torch.stack(slopes).sum()  # zᵀ∇L
    products = torch.autograd.grad(slope, parameters, materialize_grads=True)  # Hz
    return flat(map(torch.mul, signs, products))


@dataclass(frozen=True, eq=False)
class MovingMoments:
    """Exponential means of gradients and of squared Hessian diagonals, or of squared gradients, as Adam has them."""

    first: Tensor  # (1−β1) Σ_s β1^(l−s) g_s, [p]
    second: Tensor | None  # (1−β2) Σ_s β2^(l−s) diag(H_s)², [p]; None: the model is linear
    updates: int = 0  # l
    betas: tuple[float, float] = BETAS  # (0, 0): the latest only

    def updated(self, gradient: Tensor, diagonal: Tensor | None) -> "MovingMoments":
        """Return the means with one more gradient and diagonal."""
        beta1, beta2 = self.betas
        first = beta1 * self.first.to(gradient) + (1 - beta1) * gradient  # a checkpoint restores it on the CPU
        second = None
        if self.second is not None and diagonal is not None:
            # One draw of z estimates with noise of either sign. Squares cannot cancel, so curvature remains visible.
            second = beta2 * self.second.to(diagonal) + (1 - beta2) * diagonal.square()
        return replace(self, first=first, second=second, updates=self.updates + 1)

    @property
    def gradient(self) -> Tensor:
        """ḡ = EMA_β1(g) / (1 − β1^l), [p]."""
        return self.first / (1 - self.betas[0] ** self.updates)

    @property
    def diagonal(self) -> Tensor | None:
        """H̄ = sqrt(EMA_β2(diag(H)²) / (1 − β2^l)), [p], never negative."""
        if self.second is None:
            return None
        return (self.second / (1 - self.betas[1] ** self.updates)).sqrt()


@dataclass(eq=False)
class Region:
    """A local model of the loss, fitted at w_l, checked every T1 steps, and expired once ρ > τ."""

    moments: MovingMoments  # over all regions so far
    anchor: Tensor  # w_l [p]
    loss: float = 0.0  # L(w_l)
    expired: bool = True  # by the latest check; True before the first fit
    interval: int = 1  # T1
    age: int = 0  # steps since the last check
    first_curvature: float = 0.0  # ‖H̄_0‖; 0 = not measured yet

    def prediction(self, parameters: Tensor, loss: float) -> float:
        """Return F(w − w_l) at the weights w [p], for samples with a known loss at w_l."""
        moved = parameters - self.anchor.to(parameters)  # δ
        slope = float(self.moments.gradient.to(moved) @ moved)  # ḡᵀδ
        diagonal = self.moments.diagonal
        bend = 0.0 if diagonal is None else 0.5 * float(diagonal.to(moved) @ moved.square())  # ½ δᵀ diag(H̄) δ
        return loss + slope + bend

    @property
    def curvature(self) -> float:
        """‖H̄‖; 0 for a linear model."""
        diagonal = self.moments.diagonal
        return 0.0 if diagonal is None else float(diagonal.norm())


def relative_error(model: float, loss: float) -> float:
    """Return ρ = |F − L| / L; infinite if F is not finite, or if L = 0 and F is not; a loss L must be finite."""
    if not math.isfinite(loss):
        raise UserError(f"the loss became {loss} at a check of CREST's model: lower the learning rate")
    if loss == 0 or not math.isfinite(model):
        return 0.0 if model == loss else math.inf
    return abs(model - loss) / loss


def check_interval(h: float, first: float, now: float) -> int:
    """Return T1 = ⌈h · ‖H̄_0‖ / ‖H̄‖⌉, the steps between checks: the flatter the loss, the more steps.

    ``first`` is ‖H̄_0‖ and ``now`` is ‖H̄‖. If either is 0, curvature is unknown and T1 = ⌈h⌉.
    """
    if now > 0 and first > 0:
        return math.ceil(h * first / now)
    return math.ceil(h)


def trains_as_it_evaluates(model: nn.Module) -> bool:
    """Return True if a sample's gradient is the same in both modes: no active batch norm or dropout."""
    for module in model.modules():
        # Attention and recurrent layers have their own dropout, a number.
        rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
        drops = isinstance(rate, int | float) and rate > 0
        if module.training and (drops or isinstance(module, _BatchNorm)):
            return False
    return True

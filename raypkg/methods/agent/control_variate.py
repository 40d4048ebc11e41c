"""AGENT's adaptive gradient correction: a control variate with an adaptive weight (arXiv:2301.03573).

    θ̃ ← θ,   g̃ = the full gradient at θ̃
    step with   ∇ℓ_B(θ) − a·(∇ℓ_B(θ̃) − g̃)        a = γc

a = 0 is SGD, a = 1 is SVRG. The correction leaves this share of the variance of batch gradients:

    1 − 2aρs + a²s²        ρ the correlation of ∇ℓ_B(θ) and ∇ℓ_B(θ̃), s the ratio of their deviations

Its minimum, 1 − ρ², is at a = ρ/s = Cov / Var(∇ℓ_B(θ̃)). A corrected step computes q gradients. A batch q times as large
costs the same and has 1/q of the variance, so the correction is worthwhile if it leaves less than 1/q.
A layer is a parameter; gradients are lists with one tensor per layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raypkg.core.errors import UserError

from .settings import DAMPING, AgentOptions

PAIRS = 8  # of successive steps, in a look
SPARSELY = 8  # at most one such pair per 8 steps: a quarter of an epoch's gradients
FALLEN = 0.5  # a learning rate that has halved causes a look: weights then stay closer to the snapshot


def spread(
    current: list[Tensor], snapshot: list[Tensor], current_before: list[Tensor], snapshot_before: list[Tensor]
) -> Tensor:
    """Estimate Var(∇ℓ_B(θ)), the covariance with ∇ℓ_B(θ̃), and Var(∇ℓ_B(θ̃)), by layer, float64 [3, layers].

    These are half the products of differences from the step before. θ moves little between two steps, so the drift of
    the mean gradient, which is no variance of batches, cancels.
    """
    moved = torch._foreach_sub(current, current_before)
    moved_at_snapshot = torch._foreach_sub(snapshot, snapshot_before)
    variance = _inner(moved, moved)
    covariance = _inner(moved, moved_at_snapshot)
    variance_at_snapshot = _inner(moved_at_snapshot, moved_at_snapshot)
    return torch.stack([variance, covariance, variance_at_snapshot]) / 2


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    # Not by BLAS: its product depends on where tensors lie in memory, and DDP moves gradients after its first step.
    products = torch._foreach_mul(list(a), list(b))
    return torch.stack([product.sum(dtype=torch.float64) for product in products])


def variance_left(moments: Tensor, weights: Tensor) -> Tensor:
    """Return the variance over all layers after and before a correction by weights a [layers], [2].

    ``moments`` come from ``spread``.

    >>> after, before = variance_left(torch.tensor([[4.0], [3.0], [9.0]]), torch.tensor([1 / 3]))
    >>> round((after / before).item(), 3)  # 1 − ρ², ρ = 3 / √(4·9)
    0.75
    """
    variance, covariance, variance_at_snapshot = moments
    after = variance - 2 * weights * covariance + weights**2 * variance_at_snapshot
    return torch.stack([after.sum(), variance.sum()])


def coefficient(current: Tensor, snapshot: Tensor) -> float:
    """Return ĉ = Cov(ℓ_B(θ), ℓ_B(θ̃)) / Var(ℓ_B(θ̃)) of batch losses [batches]; 0 if the variance is 0 or NaN.

    >>> coefficient(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 6.0]))
    0.5
    """
    snapshot = snapshot.double()
    centred = snapshot - snapshot.mean()
    variance = centred @ centred  # times the number of batches, as is the covariance
    if not variance > 0:
        return 0.0
    covariance = current.double() @ centred  # centring one of the two is enough
    return (covariance / variance).item()


class Weight:
    """The weight a = γc of the correction, in one of three forms.

        measured    c_l = Σ ⟨Δ∇ℓ_l(θ), Δ∇ℓ_l(θ̃)⟩ / Σ ‖Δ∇ℓ_l(θ̃)‖² of each layer l; c = 1 at a snapshot
        published   c ← (1 − α)·c + α·ĉ at every snapshot, from c = 0
        linear      c = 1 − t/T, epoch by epoch, as in α-SVRG (arXiv:2311.05589)

    The measured form leaves the least variance. Δ is the difference from the step before; in the sums, the newest
    counts α. At the snapshot the two gradients are equal; c falls as the weights move away. α = 0 is SVRG.
    """

    def __init__(self, options: AgentOptions):
        self.form = options.form
        self.gamma = DAMPING[options.form] if options.gamma is None else options.gamma
        self.alpha = options.alpha
        self.base = 0.0 if self.form == "published" else 1.0  # c, unless layers are measured
        self.sums: Tensor | None = None  # measured covariance, and variance at the snapshot, [2, layers]

    @property
    def c(self) -> float | Tensor:
        """The weight over all layers, without γ."""
        return self.base if self.sums is None else _ratio(self.sums.sum(dim=1))

    @property
    def acts(self) -> bool:
        """Whether gradients change."""
        return self.base != 0

    def weights(self, layers: int) -> Tensor:
        """Return γc of each layer, float64 [layers]."""
        if self.sums is None:
            return torch.full((layers,), self.gamma * self.base, dtype=torch.float64)
        return self.gamma * _ratio(self.sums)

    def restart(self, progress: float) -> None:
        """Begin at a new snapshot, after a share of training."""
        self.sums = None
        if self.form == "linear":
            self.base = 1 - progress

    def average(self, newest: float) -> None:
        """Update the published c by ĉ."""
        self.base = (1 - self.alpha) * self.base + self.alpha * newest

    def observe(self, moments: Tensor) -> None:
        """Record the result of ``spread`` for a step, [3, layers]."""
        if self.form == "measured":
            _, covariance, variance = moments
            if self.sums is None:
                self.sums = torch.stack([variance, variance])  # c = 1
            self.sums = self.sums.lerp(torch.stack([covariance, variance]), self.alpha)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return {"form": self.form, "c": self.base, "sums": self.sums}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore the state; earlier versions stored only what their form had."""
        if state.get("form", self.form) != self.form:
            raise UserError(f"the state is of form = {state['form']}, not {self.form}: the weights differ in kind")
        self.base = state.get("c", self.base)
        sums = state.get("sums")
        self.sums = None if sums is None else sums.to(device)


def _ratio(sums: Tensor) -> Tensor:
    covariance, variance = sums
    return torch.where(variance > 0, covariance / variance, 0.0)


@dataclass
class Switch:
    """The decision at each snapshot to correct, to look or to do neither until the next one.

    A look compares the gradients of some steps with those of the snapshot, to measure the effect of a correction.
    """

    always: bool  # correct even if larger batches would be better
    every: int = 4  # epochs without correction until the next look
    on: bool = False  # correct
    looks: bool = False  # look
    rate: float | None = None  # learning rate at the latest judgement; None before the first
    epoch: int = 0  # of the latest judgement

    def decide(self, left: float | None, line: float, *, rate: float, epoch: int) -> None:
        """Decide at a new snapshot: correct if the share of variance left, as far as known, is below the line, 1/q.

        Otherwise look at first, after ``every`` epochs, or if the learning rate has halved.
        """
        if left is not None:
            self.on, self.rate, self.epoch = left < line, rate, epoch
        self.on = self.on or self.always
        due = self.rate is None or epoch - self.epoch >= self.every or rate <= FALLEN * self.rate
        self.looks = not self.on and due


def steps_of_look(steps: int) -> set[int]:
    """Return the steps of a look, counted from a snapshot to the next: pairs of successive ones, evenly spread.

    >>> sorted(steps_of_look(32))
    [4, 5, 12, 13, 20, 21, 28, 29]
    """
    pairs = min(PAIRS, max(1, steps // SPARSELY))
    first = [min(steps * (2 * pair + 1) // (2 * pairs), steps - 2) for pair in range(pairs)]
    return {step + offset for step in first for offset in (0, 1)}

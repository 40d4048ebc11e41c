"""The forms of AGENT's weight a = γc: measured by layer, as published, or falling in a line."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .control_variate import coefficient, smoothed
from .settings import AgentOptions

Total = Callable[[Tensor], Tensor]  # sums a tensor over all workers


class Form:
    """What every form of the weight answers to.

    Attributes:
        c: the weight over all layers, without γ.
    """

    c: float | Tensor

    @property
    def acts(self) -> bool:
        """Whether gradients are changed."""
        return True

    def weights(self, layers: int) -> Tensor:
        """Return γc of each layer, [layers]."""
        raise NotImplementedError

    def restart(self, progress: float) -> None:
        """Begin at a new snapshot, after a share of training."""

    def observe_losses(self, losses: Tensor) -> None:
        """Take in this worker's share of (ℓ_B(θ), ℓ_B(θ̃)) of a step, [2]."""

    def observe(self, moments: Tensor) -> None:
        """Take in what ``spread`` returned for a step, [3, layers]."""

    def join(self, total: Total) -> None:
        """Sum over the workers what each of them took in."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, after ``join``."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore it."""


class Measured(Form):
    """The weight that leaves the least variance, of each layer, from the gradients of the latest steps.

        c_l = Σ ⟨∇ℓ_l(θ), ∇ℓ_l(θ̃)⟩ / Σ ‖∇ℓ_l(θ̃)‖²        of their differences from step to step, the newest counting α

    At the snapshot the two gradients are one, so c begins at 1 there, and falls as the weights move away.

    Args:
        gamma: γ.
        alpha: α; 0 = c stays 1, which is SVRG.
    """

    def __init__(self, gamma: float, alpha: float):
        self.gamma = gamma
        self.alpha = alpha
        self.sums: Tensor | None = None  # covariance, and variance at the snapshot, [2, layers]

    @property
    def c(self) -> Tensor:  # type: ignore[override]  # computed here
        """The weight over all layers, without γ."""
        if self.sums is None:
            return torch.tensor(1.0, dtype=torch.float64)
        covariance, variance = self.sums.sum(dim=1)
        return torch.where(variance > 0, covariance / variance, 0.0)

    def weights(self, layers: int) -> Tensor:
        """Return γc of each layer, [layers]."""
        if self.sums is None:
            return torch.full((layers,), self.gamma, dtype=torch.float64)
        covariance, variance = self.sums
        return self.gamma * torch.where(variance > 0, covariance / variance, 0.0)

    def restart(self, progress: float) -> None:
        """Begin at a new snapshot."""
        self.sums = None

    def observe(self, moments: Tensor) -> None:
        """Take in what ``spread`` returned for a step, [3, layers]."""
        _, covariance, variance = moments
        if self.sums is None:
            self.sums = torch.stack([variance, variance])  # c = 1
        self.sums = self.sums.lerp(torch.stack([covariance, variance]), self.alpha)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return {"sums": self.sums}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore them."""
        sums = state["sums"]
        self.sums = None if sums is None else sums.to(device)


class Published(Form):
    """One weight for all layers, from losses: c ← (1 − α)·c + α·ĉ at every snapshot, beginning at 0.

    Args:
        gamma: γ.
        alpha: α.
    """

    c: float

    def __init__(self, gamma: float, alpha: float):
        self.gamma = gamma
        self.alpha = alpha
        self.c = 0.0
        self.losses: list[Tensor] = []  # (ℓ_B(θ), ℓ_B(θ̃)) of every corrected step since the snapshot, [2]
        self.unsummed: list[Tensor] = []  # this worker's share of those of the latest steps

    @property
    def acts(self) -> bool:
        """Whether gradients are changed: not before c is known."""
        return self.gamma * self.c != 0

    def weights(self, layers: int) -> Tensor:
        """Return γc for each layer, [layers]."""
        return torch.full((layers,), self.gamma * self.c, dtype=torch.float64)

    def restart(self, progress: float) -> None:
        """Update c by the losses since the last snapshot, and begin at a new one."""
        if not self.losses:
            return
        # θ moves between the steps, and both losses fall with it. That common drift would pass for covariance of the
        # batches; from one step to the next it is small, so the differences show the batches' own.
        current, snapshot = torch.stack(self.losses, dim=1).diff()  # [batches − 1] each
        self.c = smoothed(self.c, coefficient(current, snapshot), self.alpha)
        self.losses = []

    def observe_losses(self, losses: Tensor) -> None:
        """Take in this worker's share of (ℓ_B(θ), ℓ_B(θ̃)) of a step, [2]."""
        self.unsummed.append(losses)

    def join(self, total: Total) -> None:
        """Sum what the workers took in."""
        if self.unsummed:
            self.losses += total(torch.stack(self.unsummed))
            self.unsummed = []

    def state_dict(self) -> dict[str, Any]:
        """Return c and the losses."""
        return {"c": self.c, "losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore them."""
        self.c = state["c"]
        self.losses = [loss.to(device) for loss in state["losses"]]


class Falling(Form):
    """A weight that falls epoch by epoch in a line over training, γ·(1 − t/T), as in α-SVRG (arXiv:2311.05589).

    Args:
        gamma: the weight of the first snapshot.
    """

    c: float

    def __init__(self, gamma: float):
        self.gamma = gamma
        self.c = 1.0

    def weights(self, layers: int) -> Tensor:
        """Return the weight for each layer, [layers]."""
        return torch.full((layers,), self.gamma * self.c, dtype=torch.float64)

    def restart(self, progress: float) -> None:
        """Begin at a new snapshot, after a share of training."""
        self.c = 1 - progress

    def state_dict(self) -> dict[str, Any]:
        """Return c."""
        return {"c": self.c}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore it."""
        self.c = state["c"]


def form_of(settings: AgentOptions) -> Form:
    """Return the form of the settings."""
    gamma = settings.damping
    if settings.form == "measured":
        return Measured(gamma, settings.alpha)
    if settings.form == "published":
        return Published(gamma, settings.alpha)
    return Falling(gamma)

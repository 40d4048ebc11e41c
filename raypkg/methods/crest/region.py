"""The region around w_l in which the local model of the loss is trusted, and for how many steps."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .quadratic import MovingMoments, predicted


@dataclass(eq=False)
class Region:
    """A local model of the loss that is fitted, checked every T1 steps, and expires when it is off by more than τ.

    Attributes:
        moments: smoothed gradient and curvature, over all regions so far.
        anchor: w_l, the weights at which the model was fitted [p].
        loss: L(w_l).
        drift: by how much the loss had changed at w_l since the pool was chosen; 0 where it is chosen in line.
        expired: whether the model was off at its last check; there is none before the first fit.
        interval: T1, the steps between checks.
        age: steps since the last check.
        first_curvature: ‖H̄_0‖; 0 until it is taken.
    """

    moments: MovingMoments
    anchor: Tensor
    loss: float = 0.0
    drift: float = 0.0
    expired: bool = True
    interval: int = 1
    age: int = 0
    first_curvature: float = 0.0

    @classmethod
    def none_yet(cls, order: int, *, smoothed: bool) -> "Region":
        """Return what there is before the first fit."""
        return cls(MovingMoments.none_yet(order, smoothed=smoothed), torch.empty(0))

    def begin(self, anchor: Tensor, loss: float) -> None:
        """Begin a new region at w_l: until its first check, its model is trusted."""
        self.anchor = anchor
        self.loss = loss
        self.expired = False

    def fitted(self, moments: MovingMoments, drift: float) -> None:
        """Take the gradient and the curvature of the model at w_l."""
        self.moments = moments
        self.loss += drift
        self.drift = drift

    def prediction(self, parameters: Tensor, loss: float) -> float:
        """Return F(w − w_l), what the model predicts at the weights w [p] of a loss that is given at w_l."""
        moved = parameters - self.anchor
        return predicted(loss, self.moments.gradient, self.moments.diagonal, moved)

    @property
    def curvature(self) -> float:
        """‖H̄_l‖, 0 for a linear model."""
        diagonal = self.moments.diagonal
        return 0.0 if diagonal is None else float(diagonal.norm())

    def to(self, device: torch.device) -> None:
        """Move the vectors to a device: a checkpoint leaves them on the CPU."""
        self.anchor = self.anchor.to(device)
        self.moments = self.moments.to(device)


def check_interval(h: float, first: float, now: float) -> int:
    """Return the steps between checks, T1 = ⌈h · ‖H̄_0‖ / ‖H̄_t‖⌉: the flatter, the longer.

    Args:
        h: the multiplier.
        first: ‖H̄_0‖; 0 = not known yet.
        now: ‖H̄_t‖.

    Without either curvature (0) nothing says when to check again, so T1 = ⌈h⌉.

    >>> check_interval(1, 8.0, 2.0), check_interval(1, 2.0, 8.0), check_interval(10, 0.0, 0.0)
    (4, 1, 10)
    """
    if now > 0 and first > 0:
        return math.ceil(h * first / now)
    return math.ceil(h)

"""The worth of a mini-batch coreset, by the variance of its gradient, against its cost.

Random batches of m samples miss the data's gradient by V = E‖g − ∇L‖², all r samples of a random subset by W, and a
coreset of m of them by E. A coreset is worth m · V/E random samples and costs as much as m + r/3, since a forward pass
is a third of the work. With κ = (E − W)/V, the loss by choosing, and W = V · m/r,

    V/E = 1 / (m/r + κ),    worth over cost is largest at r = m · sqrt(3/κ), where it is 1 / (sqrt(κ) + sqrt(⅓))²

so above κ = 0.18, no r makes coresets worthwhile.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

FORWARD = 1 / 3  # work of a sample forward, in terms of a sample forward and backward
SMALLEST_LOSS = 1e-4  # κ that a few draws can distinguish from 0


@dataclass(eq=False)
class Spread:
    """Sums over gradients that give their mean and their variance."""

    total: Tensor  # Σ g, [p]
    squares: float = 0.0  # Σ ‖g‖²
    count: int = 0

    def add(self, gradient: Tensor) -> None:
        """Add a gradient [p]."""
        self.total += gradient
        self.squares += float(gradient @ gradient)
        self.count += 1

    @property
    def variance(self) -> float:
        """E‖g − E g‖², estimated without bias; needs two gradients.

        >>> import torch
        >>> spread = Spread(torch.zeros(2))
        >>> for gradient in ([1.0, 0.0], [3.0, 0.0]):
        ...     spread.add(torch.tensor(gradient))
        >>> spread.variance
        2.0
        """
        of_mean = float(self.total @ self.total) / self.count
        return (self.squares - of_mean) / (self.count - 1)


def error_of_coresets(coresets: Spread, differences: Spread) -> float:
    """Return E = E‖g − ∇L‖² of coresets: their variance plus their squared bias.

    The bias is the mean of ``differences``, from each coreset's gradient to that of a random batch of the same subset.
    """
    mean = differences.total / differences.count
    by_chance = differences.variance / differences.count  # of ‖mean‖² without a bias
    bias = max(0.0, float(mean @ mean) - by_chance)
    return coresets.variance + bias


@dataclass(frozen=True)
class Look:
    """A measurement of V, E and W with the present weights."""

    step: int  # of training
    batch: int  # m
    subset: int  # r
    n: int  # samples to choose from
    random: float  # V
    coreset: float  # E
    whole: float  # W
    forward: int  # samples that went forward only
    backward: int  # samples whose gradient was computed

    @property
    def gain(self) -> float:
        """V/E, the factor by which coresets reduce the variance of random batches of their size."""
        return self.random / self.coreset if self.coreset > 0 else math.inf

    @property
    def cost(self) -> float:
        """(m + r/3) / m, the work of a step on a coreset of its own, in steps on random batches."""
        return 1 + FORWARD * self.subset / self.batch

    @property
    def best_subset(self) -> int | None:
        """The r with the largest worth over cost, at most n; None if no r makes coresets worthwhile."""
        if not self.random > 0:
            return None
        lost = max(SMALLEST_LOSS, (self.coreset - self.whole) / self.random)  # κ
        if (math.sqrt(lost) + math.sqrt(FORWARD)) ** 2 >= 1:
            return None
        return min(self.n, round(self.batch / math.sqrt(FORWARD * lost)))

    def row(self) -> dict[str, float]:
        """Return the look as a row of a table."""
        row = asdict(self) | {"gain": self.gain, "cost": self.cost}
        del row["n"]
        return row

    def sentence(self) -> str:
        """Return the result and its consequence in one line."""
        worth = _samples(self.batch * self.gain)
        whole = _samples(self.batch * self.random / self.whole) if self.whole > 0 else "any number of"
        equal = round(self.batch * self.cost)
        best = self.best_subset
        share = f"--crest.subset {best / self.n:.2g}" if best else ""
        if best is None:
            advice = f"random batches of {equal} are better, with any --crest.subset"
        elif self.gain <= self.cost:
            advice = f"random batches of {equal} are better; {share} would be worthwhile"
        elif 0.5 < best / self.subset < 2:
            advice = "worthwhile"
        else:
            advice = f"worthwhile, more so with {share}"
        return (
            f"CREST at step {self.step}: a {self.batch}-sample coreset out of {self.subset} reduces gradient variance"
            f" like {worth} random samples (all {self.subset}: like {whole}), at the cost of {equal}: {advice}"
            f" (measured on {self.backward:,} samples)"
        )


def _samples(count: float) -> str:
    return f"{count:,.0f}" if math.isfinite(count) else "any number of"


def warnings_of(model: nn.Module) -> list[str]:
    """Return a line if batch norm is active, so a sample's gradient depends on the others of its batch."""
    if not any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
        return []
    return [
        "CREST loses most of its gain with batch norm, whose statistics of medoids are not those of the data: use group"
        " norm or frozen statistics (for the built-in resnets --set model.options.norm=group, or =frozen)"
    ]

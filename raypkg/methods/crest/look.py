"""A look before paying: how many random samples a mini-batch coreset is worth, and how many it costs.

Random batches of m samples miss the data's gradient by V = E‖g − ∇L‖², all r samples of a random subset by W, a coreset
of m of them by E. A coreset is worth m · V/E random samples, and costs as much as m + r/3: a sample that goes forward
alone takes a third of one that goes forward and backward. With κ = (E − W)/V, what choosing loses, and W = V · m/r,

    V/E = 1 / (m/r + κ),    worth over cost is largest at r = m · sqrt(3/κ), where it is 1 / (sqrt(κ) + sqrt(⅓))²

so that above κ = 0.18 no r pays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD = 1 / 3  # of the work of a sample that goes forward and backward
SMALLEST_LOSS = 1e-4  # of κ that a few draws can tell from 0


@dataclass(eq=False)
class Spread:
    """Sum and sum of squares of gradients, which their variance follows from.

    Attributes:
        total: Σ g, [p].
        squares: Σ ‖g‖².
        count: of gradients.
    """

    total: Tensor
    squares: float = 0.0
    count: int = 0

    @classmethod
    def none_yet(cls, like: Tensor) -> Spread:
        """Return the sums before the first gradient."""
        return cls(torch.zeros_like(like))

    def add(self, gradient: Tensor) -> None:
        """Take in one more gradient [p]."""
        self.total += gradient
        self.squares += float(gradient @ gradient)
        self.count += 1

    @property
    def variance(self) -> float:
        """E‖g − E g‖², estimated without bias; needs two gradients.

        >>> spread = Spread.none_yet(torch.zeros(2))
        >>> for gradient in ([1.0, 0.0], [3.0, 0.0]):
        ...     spread.add(torch.tensor(gradient))
        >>> spread.variance
        2.0
        """
        of_mean = float(self.total @ self.total) / self.count
        return (self.squares - of_mean) / (self.count - 1)


@dataclass(frozen=True)
class Look:
    """What batches of each kind miss of the data's gradient, in mean squares.

    Attributes:
        step: of training.
        size: m.
        subset: r.
        n: samples to choose from.
        random: V, of m random samples.
        coreset: E, of a mini-batch coreset, bias included.
        whole: W, of all r.
        forward: samples that went forward alone for it.
        backward: samples whose gradient was computed for it.
    """

    step: int
    size: int
    subset: int
    n: int
    random: float
    coreset: float
    whole: float
    forward: int
    backward: int

    @property
    def gain(self) -> float:
        """V/E: by how much a coreset's gradient is less noisy than that of a random batch of its size."""
        return self.random / self.coreset if self.coreset > 0 else math.inf

    @property
    def cost(self) -> float:
        """What a step costs beside one on a random batch, where each takes a coreset of its own: (m + r/3) / m."""
        return 1 + FORWARD * self.subset / self.size

    @property
    def pays(self) -> bool:
        """Whether a random batch of equal cost is noisier."""
        return self.gain > self.cost

    @property
    def best_subset(self) -> int | None:
        """The r at which worth over cost is largest, at most n; None where no r pays."""
        if not self.random > 0:
            return None
        lost = max(SMALLEST_LOSS, (self.coreset - self.whole) / self.random)  # κ
        if (math.sqrt(lost) + math.sqrt(FORWARD)) ** 2 >= 1:
            return None
        best = self.size / math.sqrt(FORWARD * lost)
        return min(self.n, round(best))

    def row(self) -> dict[str, float]:
        """Return the look as a row of a table."""
        return {
            "step": self.step,
            "batch": self.size,
            "subset": self.subset,
            "random": self.random,
            "coreset": self.coreset,
            "whole": self.whole,
            "gain": self.gain,
            "cost": self.cost,
            "forward": self.forward,
            "backward": self.backward,
        }

    def sentence(self) -> str:
        """Say what it means, in one line."""
        worth = _samples(self.size * self.gain)
        whole = _samples(self.size * self.random / self.whole) if self.whole > 0 else "any number of"
        equal = round(self.size * self.cost)
        found = (
            f"CREST at step {self.step}: {self.size} samples out of {self.subset} are worth {worth} random ones"
            f" (all {self.subset}: {whole}) and cost as much as {equal}"
        )
        return f"{found}: {self._advice(equal)} (measured on {self.backward:,} samples)"

    def _advice(self, equal: int) -> str:
        best = self.best_subset
        if best is None:
            return f"random batches of {equal} do better, and no --crest.subset would change that"
        share = f"--crest.subset {best / self.n:.2g}"
        if not self.pays:
            return f"random batches of {equal} do better; {share} would pay"
        near = 0.5 < best / self.subset < 2
        return "it pays" if near else f"it pays, and more so with {share}"


def _samples(count: float) -> str:
    return f"{count:,.0f}" if math.isfinite(count) else "any number of"


def error_of_coresets(coresets: Spread, differences: Spread) -> float:
    """Return E = E‖g − ∇L‖² of coresets: their variance, and the square of their bias.

    Args:
        coresets: their gradients.
        differences: of each from the gradient of a random batch of the same subset, whose mean is the bias.
    """
    mean = differences.total / differences.count
    by_chance = differences.variance / differences.count  # of ‖mean‖² where there is no bias
    bias = max(0.0, float(mean @ mean) - by_chance)
    return coresets.variance + bias

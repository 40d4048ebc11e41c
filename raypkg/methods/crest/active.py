"""The active samples V: those that are not learned yet, of which random subsets are drawn."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class ActiveSamples:
    """Which samples are active, and what their recorded losses say of them.

    Attributes:
        active: bool [n].
        low: how many of the latest losses in a row were at most α, int32 [n].
        high: whether one was above α since samples were last excluded, bool [n].
        exclusions: how many times T2 steps have passed.
    """

    active: Tensor
    low: Tensor
    high: Tensor
    exclusions: int = 0

    @classmethod
    def all_of(cls, indices: Tensor) -> "ActiveSamples":
        """Return the samples at these positions of the training split, all active."""
        n = int(indices.max()) + 1
        nothing = torch.zeros(n, dtype=torch.bool)
        active = nothing.index_fill(0, indices, True)
        return cls(active, low=torch.zeros(n, dtype=torch.int32), high=nothing)

    @property
    def candidates(self) -> Tensor:
        """Positions of the active samples, ascending, int64."""
        return self.active.nonzero()[:, 0]

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw a random subset of the active samples."""
        return random_subset(self.candidates, count, rng)

    def record(self, indices: Tensor, losses: Tensor, alpha: float) -> None:
        """Take note of losses, which were computed for a choice or a check anyway; α = 0 takes none for low."""
        is_low = (losses <= alpha) & (alpha > 0)
        one_more = self.low[indices] + 1
        self.low[indices] = one_more.where(is_low, 0)
        self.high[indices] |= ~is_low

    def exclude(self, step: int, *, every: int, after: int, least: int) -> None:
        """Exclude what is learned, if T2 steps have passed since the last time.

        Args:
            step: of training.
            every: T2.
            after: losses in a row, each at most α, by which a sample is learned; 0 = all since the last exclusion, at
                least one.
            least: if fewer would stay active, none is excluded.
        """
        due = step // every
        if due <= self.exclusions:
            return
        self.exclusions = due
        learned = self.low >= after if after else (self.low > 0) & ~self.high
        stay = self.active & ~learned
        if int(stay.sum()) >= least:
            self.active = stay
        self.high.zero_()
        if not after:  # the paper's: losses count from one exclusion to the next
            self.low.zero_()


def random_subset(candidates: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Draw ``count`` of the candidates, or all of them if they are fewer, in random order."""
    order = torch.randperm(len(candidates), generator=rng)
    return candidates[order[:count]]

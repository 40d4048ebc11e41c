"""The active samples V: those that are not learned yet, of which random subsets are drawn."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class ActiveSamples:
    """Which samples are active, and what was recorded of them since samples were last excluded.

    Attributes:
        active: bool [n].
        highest: the highest loss recorded since the last exclusion, −∞ where there is none [n].
        exclusions: how many times T2 steps have passed.
    """

    active: Tensor
    highest: Tensor
    exclusions: int = 0

    @classmethod
    def all_of(cls, indices: Tensor) -> "ActiveSamples":
        """Return the samples at these positions of the training split, all active."""
        n = int(indices.max()) + 1
        nothing_active = torch.zeros(n, dtype=torch.bool)
        active = nothing_active.index_fill(0, indices, True)
        highest = torch.full((n,), -torch.inf)
        return cls(active, highest)

    @property
    def candidates(self) -> Tensor:
        """Positions of the active samples, ascending, int64."""
        return self.active.nonzero()[:, 0]

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw a random subset of the active samples."""
        return random_subset(self.candidates, count, rng)

    def record(self, indices: Tensor, losses: Tensor) -> None:
        """Take note of losses, which were computed for a choice or a check anyway."""
        earlier = self.highest[indices]
        self.highest[indices] = earlier.maximum(losses)

    def exclude(self, step: int, every: int, alpha: float, least: int) -> None:
        """Exclude what is learned, if T2 steps have passed since the last time.

        Args:
            step: of training.
            every: T2.
            alpha: α; 0 = exclude none.
            least: if fewer would stay active, none is excluded.
        """
        due = step // every
        if due <= self.exclusions:
            return
        self.exclusions = due
        if alpha > 0:
            self.active = remaining(self.active, self.highest, alpha, least)
        self.highest.fill_(-torch.inf)


def remaining(active: Tensor, highest: Tensor, alpha: float, least: int) -> Tensor:
    """Return which samples stay active: all but those whose recorded losses were all at most α.

    Args:
        active: bool [n].
        highest: the highest loss recorded since the last exclusion, −∞ where there is none: those stay [n].
        alpha: α.
        least: if fewer would stay, none is excluded.

    >>> import torch
    >>> remaining(torch.ones(4, dtype=bool), torch.tensor([0.05, 0.2, -torch.inf, 0.1]), 0.1, least=1)
    tensor([False,  True,  True, False])
    """
    learned = (highest <= alpha) & highest.isfinite()
    stay = active & ~learned
    return stay if int(stay.sum()) >= least else active


def random_subset(candidates: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Draw ``count`` of the candidates, or all of them if they are fewer, in random order."""
    order = torch.randperm(len(candidates), generator=rng)
    return candidates[order[:count]]

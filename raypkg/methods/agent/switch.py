"""Whether AGENT corrects: only where that is better than larger batches, by the variance that is left.

A corrected step computes q gradients. A batch q times as large costs the same and has 1/q of the variance, so what the
correction leaves must lie below that line. Where it does not, AGENT is off, and looks again from time to time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PAIRS = 8  # of successive steps, at which an epoch without correction is looked at
SPARSELY = 8  # one such pair for so many steps: a quarter of an epoch's gradients at most
FALLEN = 0.5  # of the learning rate: the weights move half as far from the snapshot


@dataclass
class Switch:
    """Decides, at each snapshot, what is done until the next: correct, or look, or neither.

    Attributes:
        always: correct, whether it pays or not.
        every: epochs without correction until the next look.
        on: whether steps are corrected.
        looks: whether some steps' gradients are compared with the snapshot's, to judge what a correction would leave.
        rate: learning rate at the latest judgement; None before the first.
        epoch: of the latest judgement.
    """

    always: bool
    every: int
    on: bool = False
    looks: bool = False
    rate: float | None = None
    epoch: int = 0

    def judge(self, left: float, line: float, *, rate: float, epoch: int) -> None:
        """Switch by the share of variance that was left since the latest snapshot, or would have been."""
        self.on = self.always or left < line
        self.rate = rate
        self.epoch = epoch

    def begin(self, *, rate: float, epoch: int) -> None:
        """Decide what is done until the next snapshot."""
        self.on = self.on or self.always
        self.looks = not self.on and self._is_due(rate, epoch)

    def _is_due(self, rate: float, epoch: int) -> bool:
        if self.rate is None:
            return True
        return epoch - self.epoch >= self.every or rate <= FALLEN * self.rate

    def state_dict(self) -> dict[str, Any]:
        """Return what was decided."""
        return {"on": self.on, "looks": self.looks, "rate": self.rate, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.on = state["on"]
        self.looks = state["looks"]
        self.rate = state["rate"]
        self.epoch = state["epoch"]


def looked_at(steps: int) -> set[int]:
    """Return which steps after a snapshot are looked at: pairs of successive ones, spread evenly.

    Args:
        steps: from that snapshot to the next.

    >>> sorted(looked_at(32))
    [4, 5, 12, 13, 20, 21, 28, 29]
    """
    pairs = min(PAIRS, max(1, steps // SPARSELY))
    first = [steps * (2 * pair + 1) // (2 * pairs) for pair in range(pairs)]
    first = [min(step, steps - 2) for step in first]
    return {step + offset for step in first for offset in (0, 1)}

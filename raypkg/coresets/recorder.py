"""A hook that keeps what training sees of each sample: its latest loss, how often it was forgotten, its margins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raypkg.engine.hooks import Hook
from raypkg.engine.run import Run, Seen

from .record import Record, margins_of


class Recorder(Hook):
    """Gathers every step's losses and hits at the end of an epoch, over all workers with one all-reduce.

    Args:
        y: labels of the whole training split, int64 [n].
    """

    priority = 0

    def __init__(self, y: Tensor):
        self.y = y
        self.losses = torch.full(y.shape, torch.inf)
        self.right = torch.zeros(len(y), dtype=torch.bool)  # classified rightly, the latest time
        self.learned = torch.zeros(len(y), dtype=torch.bool)  # and at any time
        self.forgotten = torch.zeros(len(y))  # times
        self.epochs = torch.zeros(len(y))  # in which it was trained on
        self.total_margin = torch.zeros(len(y))  # Σ of the mean margin in each of them
        self._steps: list[Seen] = []

    @property
    def record(self) -> Record:
        """The record up to the last complete epoch."""
        forgotten = self.forgotten.where(self.learned, torch.inf)
        mean = self.total_margin / self.epochs.clamp(min=1)
        margins = mean.where(self.epochs > 0, torch.inf)
        return Record(self.y, self.losses, forgotten, margins)

    def on_step(self, run: Run) -> None:
        """Keep the step's tensors where they are: no transfer, no wait."""
        self._steps.append(run.seen)

    def on_epoch_end(self, run: Run) -> None:
        """Take in an epoch: of a sample seen several times, the mean loss, and whether it was right every time."""
        own = self._sums()
        self._steps.clear()
        times, total_loss, times_right, total_margin = run.worker.sum(own)
        if run.worker.world > 1:
            run.cost.sent += own.nbytes
        seen = times > 0
        losses = total_loss / times.clamp(min=1)
        right = times_right == times
        self.forgotten += seen & self.right & ~right
        self.learned |= seen & right
        self.losses = losses.where(seen, self.losses)
        self.right = right.where(seen, self.right)
        self.epochs += seen
        self.total_margin += total_margin / times.clamp(min=1)

    def _sums(self) -> Tensor:
        """Return how often this worker saw each sample in the epoch, Σ loss, times right, and Σ margin, [4, n]."""
        indices = torch.cat([step.indices for step in self._steps])
        losses = torch.cat([step.losses for step in self._steps])
        right = torch.cat([step.right for step in self._steps])
        ones = torch.ones_like(losses)
        margins = margins_of(losses).to(losses)
        rows = torch.stack([ones, losses, right.to(losses), margins])  # [4, steps · b]
        sums = torch.zeros(4, len(self.y))
        return sums.index_add_(1, indices.cpu(), rows.float().cpu())

    def state_dict(self) -> dict[str, Any]:
        """Return the parts of the record."""
        return {
            "losses": self.losses,
            "right": self.right,
            "learned": self.learned,
            "forgotten": self.forgotten,
            "epochs": self.epochs,
            "total_margin": self.total_margin,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the parts of the record."""
        self.losses = state["losses"].clone()
        self.right = state["right"].clone()
        self.learned = state["learned"].clone()
        self.forgotten = state["forgotten"].clone()
        self.epochs = state["epochs"].clone()
        self.total_margin = state["total_margin"].clone()

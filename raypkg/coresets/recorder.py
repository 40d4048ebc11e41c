"""A hook that keeps what training sees of each sample: its latest loss, and how often it was forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raypkg.engine.run import Hook, Run

from .record import Record


class Recorder(Hook):
    """Gathers every step's losses and hits at the end of an epoch, over all workers with one all-reduce.

    Args:
        y: labels of the whole training split, int64 [n].
    """

    def __init__(self, y: Tensor):
        self.y = y
        self.losses = torch.full(y.shape, torch.inf)
        self.right = torch.zeros(len(y), dtype=torch.bool)  # the latest time
        self.learned = torch.zeros(len(y), dtype=torch.bool)  # at any time
        self.forgotten = torch.zeros(len(y))
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def record(self) -> Record:
        """The record up to the last complete epoch."""
        return Record(self.y, self.losses, self.forgotten.where(self.learned, torch.inf))

    def on_step(self, run: Run) -> None:
        """Keep the step's tensors where they are: no transfer, no wait."""
        self._steps.append((run.seen.indices, run.seen.losses, run.seen.right))

    def on_epoch_end(self, run: Run) -> None:
        """Take in an epoch: of a sample seen several times, the mean loss, and whether it was right every time."""
        indices, losses, right = (torch.cat(part).cpu() for part in zip(*self._steps, strict=True))
        self._steps.clear()
        epoch = torch.zeros(3, len(self.y))  # times seen, Σ loss, times right
        epoch.index_add_(1, indices, torch.stack([torch.ones_like(losses), losses, right.to(losses)]).float())
        times, losses, right = run.worker.sum(epoch)
        run.cost.sent += epoch.nbytes * (run.worker.world > 1)
        seen, losses, right = times > 0, losses / times.clamp(min=1), right == times
        self.forgotten += seen & self.right & ~right
        self.losses, self.right = losses.where(seen, self.losses), right.where(seen, self.right)
        self.learned |= seen & right

    def state_dict(self) -> dict[str, Any]:
        """Return the record's parts."""
        return {name: getattr(self, name) for name in ("losses", "right", "learned", "forgotten")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the parts back."""
        for name, value in state.items():
            setattr(self, name, value.clone())

"""What training consists of: the run and its state, and what a hook may do to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raypkg.core.settings import Training
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split

from .batches import Batch, Batches, Epoch, dtype_of
from .costs import Cost
from .optimizer import optimizer
from .worker import Worker


class Seen(NamedTuple):
    """What one step saw of this worker's samples: positions in the split, losses without weights, and hits, [b]."""

    indices: Tensor
    losses: Tensor
    right: Tensor


@dataclass
class Run:
    """All that training consists of and that a checkpoint holds."""

    model: nn.Module
    split: Split
    coreset: Coreset
    settings: Training
    seed: int
    phase: str
    worker: Worker
    augment: Sequence[str]
    cost: Cost
    hooks: Sequence[Hook] = ()
    last: int | None = None  # epoch to stop after, where it is not the schedule's last
    label: int | None = None  # which of several models this is, in the metrics
    epoch: int = 0
    step: int = 0
    progress: float = 0.0  # share of the schedule that is done
    optimizer: torch.optim.Optimizer = field(init=False)
    batch: Batch = field(init=False)
    seen: Seen = field(init=False)

    def __post_init__(self) -> None:
        dtype = torch.float64 if self.settings.precision == "float64" else torch.float32
        self.model.to(self.worker.device, dtype).to(memory_format=torch.channels_last)
        self.optimizer = optimizer(self.model, self.settings)
        self._bills = {self.phase: self.cost, "evaluate": Cost("evaluate")}
        self._earlier: dict[str, Cost] = {}  # of attempts before the last restart

    def batches(self) -> Epoch:
        """Return the batches of the coming epoch: a hook's, or the shuffled coreset."""
        for hook in self.hooks:
            if (epoch := hook.batches(self)) is not None:
                return epoch
        batches = Batches(
            self.split,
            self.coreset,
            self.settings.batch_size,
            seed=self.seed,
            augment=self.augment,
            worker=self.worker,
            dtype=dtype_of(self.model),
        )
        return Epoch(len(batches), batches.epoch(self.epoch))

    def bill(self, name: str) -> Cost:
        """Return this worker's bill for a part of the run that is not training itself; every worker opens the same."""
        return self._bills.setdefault(name, Cost(name))

    def bills(self) -> list[Cost]:
        """Return what each part of the run cost so far, over all workers (a collective) and all attempts."""
        now = {name: bill.gathered(self.worker) for name, bill in self._bills.items()}
        return [self._earlier.get(name, Cost(name)).then(bill) for name, bill in now.items()]

    def state_dict(self, bills: Sequence[Cost]) -> dict[str, Any]:
        """Return everything that the rest of training depends on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hooks": [hook.state_dict() for hook in self.hooks],
            "coreset": {"indices": self.coreset.indices, "weights": self.coreset.weights},
            "epoch": self.epoch,
            "step": self.step,
            "bills": [bill.record() for bill in bills],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as if training had never stopped."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for hook, hook_state in zip(self.hooks, state["hooks"], strict=True):
            hook.load_state_dict(hook_state)
        self.coreset = Coreset(**state["coreset"])
        self.epoch, self.step = state["epoch"], state["step"]
        self._earlier = {bill["phase"]: Cost(**bill) for bill in state["bills"]}
        self.cost = Cost(self.phase)
        self._bills = {name: Cost(name) for name in self._earlier} | {self.phase: self.cost}


class Hook:
    """Does nothing at any point of the loop; a method overrides what it needs. State travels with checkpoints."""

    def on_start(self, run: Run) -> None:
        """Before training, and before a checkpoint is taken up: may change the first weights."""

    def on_epoch(self, run: Run) -> None:
        """Before an epoch; may replace ``run.coreset``; its work goes on a bill of its own, ``run.bill(name)``."""

    def batches(self, run: Run) -> Epoch | None:
        """Return the batches of the coming epoch, if this hook chooses them; otherwise the coreset is shuffled."""
        return None

    def on_gradients(self, run: Run) -> None:
        """After the backward pass of ``run.batch``; may edit ``.grad`` in place."""

    def on_step(self, run: Run) -> None:
        """After the optimiser's step."""

    def on_epoch_end(self, run: Run) -> None:
        """After an epoch's last step, before its checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values that ``load_state_dict`` takes back."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state."""

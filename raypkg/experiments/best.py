"""Keeping the model of the epoch that was best on the held-out samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from raypkg.engine.hooks import Hook, Results
from raypkg.engine.run import Run


class BestEpoch(Hook):
    """Keeps the weights of the epoch with the best held-out accuracy, the first of equals.

    They are in the checkpoints, so that whenever a run is stopped it goes on as if it had not been.
    """

    def __init__(self) -> None:
        self.epoch = 0  # none yet
        self.accuracy = -1.0
        self.measured = 0  # epochs
        self.weights: dict[str, Tensor] = {}

    def take(self, model: nn.Module, epoch: int, accuracy: float) -> None:
        """Take in the accuracy of an epoch, and the weights where it is the best so far."""
        self.measured += 1
        if accuracy <= self.accuracy:
            return
        self.epoch = epoch
        self.accuracy = accuracy
        for name, tensor in model.state_dict().items():
            self.weights[name] = tensor.to("cpu", copy=True)

    def results(self, run: Run) -> Results:
        """Return which epoch it was."""
        finding = (
            f"the model is that of epoch {self.epoch} of {run.epoch}, the best of {self.measured} on the held-out"
            f" samples: accuracy {self.accuracy:.2%}"
        )
        return Results(facts={"kept_epoch": self.epoch}, findings=[finding])

    def state_dict(self) -> dict[str, Any]:
        """Return the best epoch so far, with its weights."""
        return {
            "epoch": self.epoch,
            "accuracy": self.accuracy,
            "measured": self.measured,
            "weights": dict(self.weights),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.epoch = state["epoch"]
        self.accuracy = state["accuracy"]
        self.measured = state["measured"]
        self.weights = dict(state["weights"])

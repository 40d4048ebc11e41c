"""What a method may do to the one loop: replace the coreset or the batches, edit gradients, look at each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .batches import Epoch
    from .loop import Run


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


class Masked(Hook):
    """Keeps pruned weights at zero by zeroing their gradients: w ⊙ m stays, momentum and decay of 0 are 0.

    The arithmetic stays dense: this simulates sparsity and saves no time.

    Args:
        masks: True where a weight is kept, by the parameter's name; what an earlier hook changes in them holds.
    """

    def __init__(self, masks: Mapping[str, Tensor]):
        self.masks = masks

    def on_start(self, run: Run) -> None:
        """Set the weights to w ⊙ m."""
        self.masks = {name: mask.to(run.worker.device) for name, mask in self.masks.items()}
        for name, mask in self.masks.items():
            run.model.get_parameter(name).data.mul_(mask)

    def on_gradients(self, run: Run) -> None:
        """Zero the gradients of pruned weights."""
        self.zero(run, self.masks)

    def zero(self, run: Run, names: Iterable[str]) -> None:
        """Zero those of some parameters."""
        for name in names:
            if (gradient := run.model.get_parameter(name).grad) is not None:
                gradient.mul_(self.masks[name])

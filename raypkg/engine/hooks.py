"""What a method may do to the one loop: replace the coreset or the batches, edit gradients, look at each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from .batches import Epoch
    from .loop import Run


class Hook:
    """Does nothing at any point of the loop; a method overrides what it needs. State travels with checkpoints."""

    def on_epoch(self, run: Run) -> None:
        """Before an epoch; may replace ``run.coreset``; its work goes on a bill of its own, ``run.bill(name)``."""

    def batches(self, run: Run) -> Epoch | None:
        """Return the batches of the coming epoch, if this hook chooses them; otherwise the coreset is shuffled."""
        return None

    def on_gradients(self, run: Run) -> None:
        """After the backward pass; may edit ``.grad`` in place."""

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
        model: its parameters named in ``masks`` are set to w ⊙ m at once.
        masks: True where a weight is kept.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]):
        named = dict(model.named_parameters())
        self.weights = [named[name] for name in masks]
        self.masks = [masks[name].to(weight) for name, weight in zip(masks, self.weights, strict=True)]
        for weight, mask in zip(self.weights, self.masks, strict=True):
            weight.data.mul_(mask)

    def on_gradients(self, run: Run) -> None:
        """Zero the gradients of pruned weights."""
        for weight, mask in zip(self.weights, self.masks, strict=True):
            if weight.grad is not None:
                weight.grad.mul_(mask)

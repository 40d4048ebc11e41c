"""Hooks that keep weights that do not exist out of training: zeroed, or not computed with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from raypkg.engine.run import Hook, Run

from .active_linear import ActiveLinear, pattern_of
from .csr import exchange_linear

if TYPE_CHECKING:
    from .hook import Topology


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


class Active(Masked):
    """Puts sparse linear layers into the model, and keeps their patterns those of the masks.

    Between the steps at which masks change their parameters, and what the optimiser remembers of them, hold the weights
    that exist and no others; in these steps, and between epochs, all, with the gradients of all. With several workers
    they always hold all, because DDP lays out its buckets once; gradients are of those that exist all the same.

    Args:
        topology: whose masks; a hook before this one.
    """

    def __init__(self, topology: Topology):
        super().__init__(topology.masks)
        self.topology = topology
        self.layers: dict[str, ActiveLinear] = {}  # by the names of their weights

    def on_start(self, run: Run) -> None:
        """Exchange the layers; their parameters stay."""
        super().on_start(run)
        exchange_linear(run.model, ActiveLinear)
        layers = {f"{name}.weight": layer for name, layer in run.model.named_modules()}
        self.layers = {name: layers[name] for name in self.masks if isinstance(layers[name], ActiveLinear)}

    def on_epoch(self, run: Run) -> None:
        """Take over the first masks, which a checkpoint may have replaced."""
        if any(layer.pattern is None for layer in self.layers.values()):
            self._follow()
        self._hold(run)

    def on_gradients(self, run: Run) -> None:
        """Zero the gradients of pruned weights that were computed; take the masks over where they have changed."""
        due = self.topology.due(run.step)
        self.zero(run, self.masks if due else self.masks.keys() - self.layers.keys())
        if due:
            self._follow()

    def on_step(self, run: Run) -> None:
        """Hold what the next step needs: all weights where it changes the masks."""
        self._hold(run)

    def on_epoch_end(self, run: Run) -> None:
        """Hold all weights."""
        for layer in self.layers.values():
            _hold_all(layer, run.optimizer)

    def _hold(self, run: Run) -> None:
        due = self.topology.due(run.step)
        for layer in self.layers.values():
            layer.whole_gradient = due
            if due:
                _hold_all(layer, run.optimizer)
            elif run.worker.world == 1:
                _hold_active(layer, run.optimizer)

    def _follow(self) -> None:
        for name, layer in self.layers.items():
            layer.pattern = pattern_of(self.topology.masks[name])


def _hold_active(layer: ActiveLinear, optimizer: Optimizer) -> None:
    if layer.weight.dim() == 2 and layer.pattern:
        for tensor in _like(layer.weight, optimizer):
            tensor.data = layer.pattern.values(tensor.data)


def _hold_all(layer: ActiveLinear, optimizer: Optimizer) -> None:
    if layer.weight.dim() == 1 and layer.pattern:
        for tensor in _like(layer.weight, optimizer):
            tensor.data = layer.pattern.whole(tensor.data)


def _like(weight: Tensor, optimizer: Optimizer) -> list[Tensor]:
    """Return a parameter and what the optimiser remembers of each of its elements."""
    state = optimizer.state.get(weight, {}).values()
    return [weight, *(value for value in state if isinstance(value, Tensor) and value.shape == weight.shape)]

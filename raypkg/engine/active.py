"""A hook that lets linear layers compute with the weights that exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raypkg.methods.sparse.csr import exchange_linear
from raypkg.methods.sparse.linear import ActiveLinear, pattern_of

from .hooks import Masked

if TYPE_CHECKING:
    from .loop import Run
    from .topology import Topology


class Active(Masked):
    """Puts sparse linear layers into the model, and keeps their patterns those of the masks.

    The gradient of weights that do not exist is computed in the steps at which masks change, and in no other.

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
            self._follow(run.step)

    def on_gradients(self, run: Run) -> None:
        """Zero the gradients of pruned weights that were computed; take the masks over where they have changed."""
        due = self.topology.due(run.step)
        self.zero(run, self.masks if due else self.masks.keys() - self.layers.keys())
        if due:
            self._follow(run.step + 1)

    def on_step(self, run: Run) -> None:
        """Ask for whole gradients where the next step changes the masks."""
        for layer in self.layers.values():
            layer.dense_gradient = self.topology.due(run.step)

    def _follow(self, step: int) -> None:
        for name, layer in self.layers.items():
            layer.pattern = pattern_of(self.topology.masks[name])
            layer.dense_gradient = self.topology.due(step)

"""Hooks that keep weights that do not exist out of training: zeroed, or not computed with."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor
from torch.optim import Optimizer

from raypkg.engine.run import Hook, Run

from .active_linear import ActiveLinear, pattern_of
from .csr import exchange_linear


class Masked(Hook):
    """Keeps pruned weights at zero by zeroing their gradients: w ⊙ m stays, momentum and decay of 0 are 0.

    The arithmetic stays dense: this simulates sparsity and saves no time.

    Args:
        masks: True where a weight is kept, by the parameter's name; an earlier hook may change them in place.
    """

    order = 100

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
        """Zero the pruned gradients of some parameters."""
        for name in names:
            gradient = run.model.get_parameter(name).grad
            if gradient is not None:
                gradient.mul_(self.masks[name])


class Active(Masked):
    """Puts sparse linear layers into the model, and keeps their patterns equal to the masks.

    A parameter, and what the optimiser remembers of it, has one of two forms:

        steps that change the masks, between epochs:  all weights [out, in], with the gradients of all
        any other step:                               the k weights that exist [k], with theirs

    With several workers the first form is kept throughout, because DDP lays out its buckets once; gradients are of the
    weights that exist all the same.

    Args:
        masks: of a hook before this one, which changes them in place.
        due: whether that hook changes them in a step, given its number.
    """

    def __init__(self, masks: Mapping[str, Tensor], due: Callable[[int], bool]):
        super().__init__(masks)
        self.due = due
        self.layers: dict[str, ActiveLinear] = {}  # by the names of their weights

    def on_start(self, run: Run) -> None:
        """Exchange the layers; their parameters stay."""
        super().on_start(run)
        exchange_linear(run.model, ActiveLinear)
        for name, layer in run.model.named_modules():
            weight_name = f"{name}.weight"
            if isinstance(layer, ActiveLinear) and weight_name in self.masks:
                self.layers[weight_name] = layer

    def on_epoch(self, run: Run) -> None:
        """Adopt the first masks, which a checkpoint may have replaced since ``on_start``."""
        if any(layer.pattern is None for layer in self.layers.values()):
            self._adopt_masks()
        self._hold(run)

    def on_gradients(self, run: Run) -> None:
        """Zero the gradients of pruned weights that were computed; adopt the masks where they have changed."""
        if self.due(run.step):
            self.zero(run, self.masks)
            self._adopt_masks()
        else:
            self.zero(run, self.masks.keys() - self.layers.keys())

    def on_step(self, run: Run) -> None:
        """Hold what the next step needs: all weights where it changes the masks."""
        self._hold(run)

    def on_epoch_end(self, run: Run) -> None:
        """Hold all weights, as a checkpoint needs them."""
        for layer in self.layers.values():
            _hold_all(layer, run.optimizer)

    def _hold(self, run: Run) -> None:
        due = self.due(run.step)
        for layer in self.layers.values():
            layer.whole_gradient = due
            if due:
                _hold_all(layer, run.optimizer)
            elif run.worker.world == 1:
                _hold_active(layer, run.optimizer)

    def _adopt_masks(self) -> None:
        for name, layer in self.layers.items():
            layer.pattern = pattern_of(self.masks[name])


def _hold_active(layer: ActiveLinear, optimizer: Optimizer) -> None:
    """Reduce a layer's weights to those that exist, [out, in] → [k], and with them the optimiser's state."""
    if layer.weight.dim() == 2 and layer.pattern:
        for tensor in _like(layer.weight, optimizer):
            tensor.data = layer.pattern.values(tensor.data)


def _hold_all(layer: ActiveLinear, optimizer: Optimizer) -> None:
    """Return a layer's weights and the optimiser's state to their whole shape, [k] → [out, in]."""
    if layer.weight.dim() == 1 and layer.pattern:
        for tensor in _like(layer.weight, optimizer):
            tensor.data = layer.pattern.whole(tensor.data)


def _like(weight: Tensor, optimizer: Optimizer) -> list[Tensor]:
    """Return a parameter and what the optimiser remembers of each of its elements."""
    tensors = [weight]
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            tensors.append(value)
    return tensors

"""What a step of training takes of a worker's memory, told without taking it."""

from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raypkg.core.settings import Training
from raypkg.data.split import Split

COPIES = {"sgd": 1, "adamw": 2}  # numbers that the optimiser keeps for each parameter; SGD only with momentum


class StepMemory(NamedTuple):
    """Bytes that a step of training takes.

    Attributes:
        weights: of the parameters.
        gradients: of those that are trained.
        state: of the optimiser.
        activations: kept for the backward pass of one batch, the batch included; None where that cannot be told.
    """

    weights: int
    gradients: int
    state: int
    activations: int | None

    @property
    def all(self) -> int:
        """Their sum, as far as it is known."""
        return self.weights + self.gradients + self.state + (self.activations or 0)


def step_memory(model: nn.Module, split: Split, batch: int, training: Training) -> StepMemory:
    """Return what training a model takes.

    Args:
        model: to train.
        split: the samples.
        batch: how many of them a step has on one worker.
        training: its optimiser and precision.
    """
    dtype = torch.float64 if training.precision == "float64" else torch.float32
    parameters = list(model.parameters())
    trained = sum(each.numel() for each in parameters if each.requires_grad) * dtype.itemsize
    copies = COPIES[training.optimizer]
    if training.optimizer == "sgd" and not training.momentum:
        copies = 0
    return StepMemory(
        weights=sum(each.numel() for each in parameters) * dtype.itemsize,
        gradients=trained,
        state=copies * trained,
        activations=_kept_for_backward(model, split.kind.unallocated(batch, split.shape, dtype), dtype),
    )


def _kept_for_backward(model: nn.Module, x: Tensor, dtype: torch.dtype) -> int | None:
    """Return the bytes that a forward pass keeps, by one on a device that computes and allocates nothing."""
    twin = deepcopy(model).to("meta", dtype).train()
    own = {_storage_of(each) for each in [*twin.parameters(), *twin.buffers()]}
    kept = {_storage_of(x): x.untyped_storage()}  # by which each is counted once

    def keep(tensor: Tensor) -> Tensor:
        if _storage_of(tensor) not in own:
            kept[_storage_of(tensor)] = tensor.untyped_storage()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            twin(x)
    except Exception:  # the user's own model may look at values, and here are none
        return None
    return sum(storage.nbytes() for storage in kept.values())


def _storage_of(tensor: Tensor) -> int:
    """Return what tells the memory of a tensor from that of others, which is at no address here."""
    return tensor.untyped_storage()._cdata

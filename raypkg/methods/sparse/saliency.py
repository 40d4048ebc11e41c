"""Saliency of each weight before training, from one batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masks import prunable

_gradients = partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)  # 0 of layers not in use


def snip(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return |g ⊙ w|, g the gradient of the mean loss of one batch at the current weights (arXiv:1810.02340).

    Args:
        model: left as it was, statistics of batch norm included.
        x: one batch, float [b, …].
        y: its labels, int64 [b].
    """
    weights = prunable(model)
    with _training(model):
        loss = F.cross_entropy(model(x), y)
        gradients = _gradients(loss, list(weights.values()))
    return {name: (g * w).detach().abs() for (name, w), g in zip(weights.items(), gradients, strict=True)}


def grasp(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return w ⊙ Hg: by how much a weight's removal would lower ‖g‖², to first order (arXiv:2002.07376).

    Differs from the paper: the loss has no temperature, and one batch serves for g and for H.

    Args:
        model: left as it was, statistics of batch norm included.
        x: one batch, float [b, …].
        y: its labels, int64 [b].
    """
    weights = prunable(model)
    with _training(model):
        loss = F.cross_entropy(model(x), y)
        gradients = _gradients(loss, list(weights.values()), create_graph=True)
        flow = torch.stack([(g * g.detach()).sum() for g in gradients]).sum()
        products = _gradients(flow, list(weights.values()))  # Hg
    return {name: (w * product).detach() for (name, w), product in zip(weights.items(), products, strict=True)}


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Use batch statistics inside the block, and keep nothing of them."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    model.train()
    yield
    model.train(was_training).load_state_dict(buffers, strict=False)

"""Saliency of each weight before training, from one batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .masks import prunable


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
    saliency = {}
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        saliency[name] = (gradient * weight).detach().abs()
    return saliency


def grasp(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return w ⊙ Hg: by how much a weight's removal would lower ‖g‖², to first order (arXiv:2002.07376).

    Differs from the paper: the loss has no temperature, and one batch serves for g and for H.

    Args:
        model: left as it was, statistics of batch norm included.
        x: one batch, float [b, …].
        y: its labels, int64 [b].
    """
    weights = prunable(model)
    parameters = list(weights.values())
    # attention as plain products: PyTorch cannot differentiate its fused forms twice
    with _training(model), sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(model(x), y)
        gradients = _gradients(loss, parameters, create_graph=True)
        # H never exists: the gradient of gᵀ·(g as a constant) is Hg.
        flow = torch.stack([(gradient * gradient.detach()).sum() for gradient in gradients]).sum()
        products = _gradients(flow, parameters)  # Hg
    saliency = {}
    for (name, weight), product in zip(weights.items(), products, strict=True):
        saliency[name] = (weight * product).detach()
    return saliency


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Use batch statistics inside the block, and keep nothing of them."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    model.train()
    yield
    model.train(was_training)
    model.load_state_dict(buffers, strict=False)


def _gradients(output: Tensor, parameters: Sequence[nn.Parameter], *, create_graph: bool = False) -> tuple[Tensor, ...]:
    """Return the gradients of a scalar, zeros for layers that the forward pass does not use."""
    return torch.autograd.grad(
        output,
        parameters,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )

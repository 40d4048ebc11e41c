"""A model's parameters as one vector."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def to_vector(tensors: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
    """Return tensors as one vector on the CPU, a copy."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu()


def assign(model: nn.Module, w: Tensor) -> None:
    """Overwrite a model's parameters with those of a vector, in the order of ``parameters()``."""
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(w[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()

"""Running statistics of batch norm for merged weights, which saw no data as such."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate(model: nn.Module, inputs: Iterable[Tensor]) -> int:
    """Set running means and variances to those of the inputs; return the number of samples seen.

    The statistics are the plain average over batches, not an exponential one. A model without batch norm is left
    alone and sees nothing.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's way to ask for the cumulative average
    was_training = model.training
    model.train()
    seen = 0
    for x in inputs:
        model(x)
        seen += len(x)
    model.train(was_training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return seen

"""The optimiser of the settings, without the compiler.

The first call of what PyTorch keeps its compiler out of imports that compiler, which takes as long as PyTorch itself.
Here models are compiled and optimisers never are, so their methods are called without those wrappers.
"""

from inspect import unwrap
from typing import Any

import torch
from torch import nn

from raypkg.core.errors import UserError
from raypkg.core.settings import Training


class Eager(torch.optim.Optimizer):
    """An optimiser that no compiler looks at."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)


class SGD(Eager, torch.optim.SGD):
    """Stochastic gradient descent."""

    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


class AdamW(Eager, torch.optim.AdamW):
    """Adam with decoupled weight decay."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """Build the optimiser of the settings, with fused multi-tensor updates.

    Raises:
        UserError: the model has nothing to train.
    """
    check_trainable(model)
    groups = _groups(model, settings)
    if settings.optimizer == "adamw":
        return AdamW(
            groups,
            settings.lr,
            betas=(settings.momentum, 0.999),
            weight_decay=settings.weight_decay,
            fused=True,
        )
    return SGD(
        groups,
        settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov and settings.momentum > 0,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _groups(model: nn.Module, settings: Training) -> list[dict[str, Any]]:
    """Return the parameters in one group, or those that decay and, in a second one, those that do not."""
    parameters = list(model.parameters())
    if settings.decay == "all":
        return [{"params": parameters}]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() < 2]
    return [{"params": matrices}, {"params": others, "weight_decay": 0.0}]


def check_trainable(model: nn.Module) -> None:
    """Refuse a model that has nothing to train.

    Raises:
        UserError: all its parameters are frozen.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("all parameters of the model are frozen (requires_grad = False): there is nothing to train")

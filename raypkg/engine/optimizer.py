"""The optimiser of the settings and its learning rate over training."""

import math
from collections.abc import Callable
from inspect import unwrap

import torch
from torch import nn

from raypkg.core.errors import UserError
from raypkg.core.settings import Training


class Eager(torch.optim.Optimizer):
    """An optimiser without PyTorch's compiler.

    The first call of a method that PyTorch excludes from compilation imports the compiler, which takes as long as
    importing PyTorch. effray never compiles optimisers, so it calls the methods beneath those wrappers.
    """

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


def build_optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """Build the optimiser of the settings, with fused multi-tensor updates; refuse a model without free parameters."""
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise UserError("all parameters of the model are frozen (requires_grad = False): there is nothing to train")
    groups: list[dict] = [{"params": parameters}]
    if settings.decay == "matrices":  # neither norms nor biases decay
        matrices = [parameter for parameter in parameters if parameter.dim() > 1]
        others = [parameter for parameter in parameters if parameter.dim() < 2]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    momentum, decay = settings.momentum, settings.weight_decay
    if settings.optimizer == "adamw":
        return AdamW(groups, settings.lr, betas=(momentum, 0.999), weight_decay=decay, fused=True)
    nesterov = settings.nesterov and momentum > 0
    fused = not hasattr(parameters[0], "full_tensor")  # PyTorch has no fused SGD of shared parameters
    return SGD(groups, settings.lr, momentum=momentum, nesterov=nesterov, weight_decay=decay, fused=fused)


# Shapes of the learning rate, as functions of the share t of training that is done.
SHAPES: dict[str, Callable[[float, Training], float]] = {
    "cosine": lambda t, settings: 0.5 * (1 + math.cos(math.pi * t)),
    "linear": lambda t, settings: min(1.0, (1 - t) / (1 - settings.warmup)),  # falls from the end of the warm-up
    "multistep": lambda t, settings: settings.lr_drop ** sum(t >= milestone for milestone in settings.milestones),
    "constant": lambda t, settings: 1.0,
}


def learning_rate(settings: Training, t: float) -> float:
    """Return the learning rate after the share ``t`` of training, 0 ≤ t < 1.

    The rate rises linearly over the warm-up share of training, and the shape of the schedule multiplies it.

    >>> learning_rate(Training(lr=0.2, schedule="multistep", milestones=[0.5]), 0.6)
    0.020000000000000004
    """
    rise = min(1.0, (t + 1e-3) / settings.warmup) if settings.warmup else 1.0
    return settings.lr * rise * SHAPES[settings.schedule](t, settings)

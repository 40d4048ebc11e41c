"""The optimiser of the settings."""

import torch
from torch import nn

from raypkg.core.errors import UserError
from raypkg.core.settings import Training


def optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """Build the optimiser of the settings, with fused multi-tensor updates.

    Raises:
        UserError: the model has nothing to train.
    """
    check_trainable(model)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            model.parameters(),
            settings.lr,
            betas=(settings.momentum, 0.999),
            weight_decay=settings.weight_decay,
            fused=True,
        )
    return torch.optim.SGD(
        model.parameters(),
        settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov and settings.momentum > 0,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def check_trainable(model: nn.Module) -> None:
    """Refuse a model that has nothing to train.

    Raises:
        UserError: all its parameters are frozen.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("all parameters of the model are frozen (requires_grad = False): there is nothing to train")

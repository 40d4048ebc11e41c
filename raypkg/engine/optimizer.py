"""The optimiser of the settings."""

import torch
from torch import nn

from raypkg.core.settings import Training


def optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """Build the optimiser of the settings, with fused multi-tensor updates."""
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

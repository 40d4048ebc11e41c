"""Masks: which weights exist. Densities per layer first, then random masks with exact counts.

Masks name only the weights of linear and convolutional layers; biases and norms are always dense.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError

Masks = dict[str, Tensor]  # parameter name → bool tensor of the parameter's shape
Densities = dict[str, float]  # parameter name → share of weights kept


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that masks apply to: all with two or more dimensions."""
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}


def erk(shapes: Mapping[str, torch.Size], density: float) -> Densities:
    """Return Erdős–Rényi-kernel densities whose weighted mean is the total density.

    d_l = ε·(n_in + n_out + k_h + k_w) / (n_in·n_out·k_h·k_w) with ε solved for the total; layers that would
    exceed 1 become dense and ε is solved again (arXiv:1911.11134).

    Raises:
        UserError: density outside (0, 1].

    >>> erk({"a": torch.Size([10, 10]), "b": torch.Size([2, 2])}, 0.5)["b"]
    1.0
    """
    if not 0 < density <= 1:
        raise UserError(f"density {density} is outside (0, 1]")
    size = {name: shape.numel() for name, shape in shapes.items()}
    raw = {name: sum(shape) / shape.numel() for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        kept = density * sum(size.values()) - sum(size[name] for name in dense)
        epsilon = kept / sum(raw[name] * size[name] for name in shapes if name not in dense)
        over = {name for name in shapes if name not in dense and epsilon * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in dense else epsilon * raw[name] for name in shapes}
        dense |= over
    return dict.fromkeys(shapes, 1.0)


def random_masks(shapes: Mapping[str, torch.Size], densities: Densities, rng: torch.Generator) -> Masks:
    """Draw masks that keep exactly round(density · size) weights of each layer, and never none."""
    masks = {}
    for name, shape in shapes.items():
        keep = max(1, round(densities[name] * shape.numel()))
        mask = torch.zeros(shape.numel(), dtype=torch.bool)
        mask[torch.randperm(shape.numel(), generator=rng)[:keep]] = True
        masks[name] = mask.view(shape)
    return masks

"""Begin with random masks of Erdős–Rényi-kernel densities."""

import torch
from torch import nn

from raypkg.methods.sparse.masks import Masks, random_masks, shapes_of
from raypkg.methods.sparse.masks import erk as densities

from . import initial


@initial("erk", source="arXiv:1911.11134")
def masks(model: nn.Module, density: float, *, rng: torch.Generator) -> Masks:
    """Draw masks that are denser where a layer is smaller."""
    shapes = shapes_of(model)
    return random_masks(shapes, densities(shapes, density), rng)

"""Begin dense: with no growth, weights are then pruned away gradually."""

import torch
from torch import nn

from raypkg.methods.sparse.masks import Masks, shapes_of

from . import initial


@initial("dense", source="arXiv:1710.01878")
def masks(model: nn.Module, density: float) -> Masks:
    """Keep all weights; the density is where gradual pruning ends."""
    return {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes_of(model).items()}

"""Begin with random masks of one density."""

import torch
from torch import nn

from raypkg.methods.sparse.masks import Masks, random_masks, shapes_of

from . import initial


@initial("uniform")
def masks(model: nn.Module, density: float, *, rng: torch.Generator) -> Masks:
    """Draw masks of the same density in every layer, the first and the last included."""
    shapes = shapes_of(model)
    return random_masks(shapes, dict.fromkeys(shapes, density), rng)

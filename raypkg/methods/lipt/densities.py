"""Random masks with the layer-wise densities of others: ratios are kept, not the weights themselves."""

import torch

from raypkg.methods.sparse.masks import Masks, random_masks


def redrawn(masks: Masks, rng: torch.Generator) -> Masks:
    """Draw masks that keep as many weights of each layer as the given ones, anywhere in it.

    >>> redrawn({"w": torch.tensor([True, False, False])}, torch.Generator().manual_seed(0))["w"].sum()
    tensor(1)
    """
    shapes = {name: mask.shape for name, mask in masks.items()}
    densities = {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()}
    return random_masks(shapes, densities, rng)

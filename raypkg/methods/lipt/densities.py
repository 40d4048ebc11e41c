"""Layer-wise densities from SNIP saliency (arXiv:1810.02340)."""

from torch import Tensor, nn

from raypkg.methods.sparse.masks import Densities, largest_masks
from raypkg.methods.sparse.saliency import snip


def snip_ratios(model: nn.Module, x: Tensor, y: Tensor, density: float) -> Densities:
    """Return the share of each layer's weights among the network's ``density`` most salient ones.

    Ratios are kept, not the weights themselves: LiPT draws random masks with them.

    Args:
        model: left as it was, statistics of batch norm included.
        x: one batch, float [b, …].
        y: its labels, int64 [b].
        density: share of all prunable weights to keep, in (0, 1].
    """
    masks = largest_masks(snip(model, x, y), density)
    return {name: mask.float().mean().item() for name, mask in masks.items()}

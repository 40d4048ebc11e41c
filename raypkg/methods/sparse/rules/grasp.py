"""Begin with the weights whose removal would least reduce the flow of gradients."""

from torch import Tensor, nn

from raypkg.methods.sparse.masks import Masks, largest_masks
from raypkg.methods.sparse.saliency import grasp

from . import initial


@initial("grasp", source="arXiv:2002.07376")
def masks(model: nn.Module, density: float, *, batch: tuple[Tensor, Tensor]) -> Masks:
    """Keep the largest w ⊙ Hg of all layers together."""
    return largest_masks(grasp(model, *batch), density)

"""Begin with the weights whose removal would change the loss most."""

from torch import Tensor, nn

from raypkg.methods.sparse.masks import Masks, largest_masks
from raypkg.methods.sparse.saliency import snip

from . import initial


@initial("snip", source="arXiv:1810.02340")
def masks(model: nn.Module, density: float, *, batch: tuple[Tensor, Tensor]) -> Masks:
    """Keep the largest |g ⊙ w| of all layers together."""
    return largest_masks(snip(model, *batch), density)

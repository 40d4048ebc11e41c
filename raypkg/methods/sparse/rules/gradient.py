"""RigL's growth: where the loss would fall fastest."""

from torch import Tensor

from . import growth


@growth("gradient", source="arXiv:1911.11134")
def score(weight: Tensor, *, gradient: Tensor) -> Tensor:
    """Grow the largest |g|, g the gradient of the step's batch as if the layer were dense."""
    return gradient.abs()

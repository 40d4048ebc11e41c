"""By magnitude: small weights go, layers of large weights grow."""

from torch import Tensor

from . import drop, redistribution


@drop("magnitude")
def score(weight: Tensor) -> Tensor:
    """Drop the smallest |w|."""
    return weight.abs()


@redistribution("magnitude")
def share(weight: Tensor) -> float:
    """Grow in proportion to a layer's mean |w|."""
    return weight.abs().mean().item()

"""By momentum, as in sparse momentum: the smoothed gradient decides."""

from torch import Tensor

from . import growth, redistribution


@growth("momentum", source="arXiv:1907.04840")
def score(weight: Tensor, *, momentum: Tensor) -> Tensor:
    """Grow the largest |m|, m the momentum of the dense gradient."""
    return momentum.abs()


@redistribution("momentum", source="arXiv:1907.04840")
def share(weight: Tensor, *, momentum: Tensor) -> float:
    """Grow in proportion to the mean |m| of a layer's active weights."""
    return momentum.abs().mean().item()

"""By size: layers keep growing as they are."""

from torch import Tensor

from . import redistribution


@redistribution("nonzeros")
def share(weight: Tensor) -> float:
    """Grow in proportion to the number of a layer's active weights."""
    return float(len(weight))

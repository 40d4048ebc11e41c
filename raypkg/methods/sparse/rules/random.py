"""SET's growth: anywhere."""

import torch
from torch import Tensor

from . import growth


@growth("random", source="arXiv:1707.04780")
def score(weight: Tensor, *, rng: torch.Generator) -> Tensor:
    """Grow inactive weights at random."""
    return torch.rand(weight.shape, generator=rng)

"""SET's rule: on either side of zero, the weights closest to it go."""

import torch
from torch import Tensor

from . import drop


@drop("set", source="arXiv:1707.04780")
def score(weight: Tensor) -> Tensor:
    """Drop the same share of the smallest positive and of the largest negative weights.

    >>> score(torch.tensor([1.0, -9.0, 2.0, 3.0, -8.0, 4.0])).tolist()
    [0.25, 1.0, 0.5, 0.75, 0.5, 1.0]
    """
    ranks = torch.empty_like(weight)
    for side in (weight > 0, weight <= 0):
        size = weight[side].abs()  # [s]
        order = size.argsort(stable=True)  # nearest to zero first
        rank = torch.arange(1, len(order) + 1).to(weight)
        ranked = torch.empty_like(size)
        ranked[order] = rank / len(order)  # the same share of each side is below a score
        ranks[side] = ranked
    return ranks

"""RDS+ (arXiv:2503.01807): a sample as the position-weighted mean of its last hidden states."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return Σ_i w_i h_i with w_i = i / Σ_j j over a sample's tokens (SGPT, arXiv:2202.08904), float32 [b, D].

    Args:
        hidden: last hidden states, float [b, l, D].
        mask: True at tokens, False at padding, bool [b, l].

    >>> hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
    >>> weighted_mean(hidden, torch.tensor([[True, True, False]]))
    tensor([[0.3333, 0.6667]])
    """
    places = mask.cumsum(dim=1) * mask  # 1, 2, …; 0 at padding
    weights = places / places.sum(dim=1, keepdim=True)  # [b, l]
    return torch.einsum("bl,bld->bd", weights.float(), hidden.float())


def rds_rows(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the weighted means at length 1, float32 [b, D]."""
    return normalize(weighted_mean(hidden, mask), dim=1)

"""Gradients of multinomial logistic regression in closed form, from samples as they are stored."""

import torch
from torch import Tensor


def logistic_gradient(w: Tensor, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return Σ_i ∇ cross-entropy of sample i: [δᵀz, Σδ] with δ = softmax(zWᵀ + b) − e_y and z = (x − shift) · scale.

    The standardisation is folded into the weights, so that stored samples are only converted, never standardised.

    Args:
        w: W [C, D] and then b [C], flattened, float64 [C·(D + 1)].
        x: uint8 or float [n, D].
        y: int64 [n].
        shift: of each column, float64 [D].
        scale: of each column, float64 [D].

    >>> w, y = torch.zeros(6, dtype=torch.float64), torch.tensor([0])
    >>> logistic_gradient(w, torch.tensor([[4, 8]], dtype=torch.uint8), y, torch.zeros(2), torch.ones(2)).tolist()
    [-2.0, -4.0, 2.0, 4.0, -0.5, 0.5]
    """
    classes = len(w) // (x.shape[1] + 1)
    weight, bias = w[:-classes].view(classes, -1), w[-classes:]
    folded = weight * scale  # [C, D]
    samples = x.to(w.dtype)  # [n, D]
    error = torch.addmm(bias - folded @ shift.to(w.dtype), samples, folded.T).softmax(1)  # p [n, C]
    error[torch.arange(len(y), device=y.device), y] -= 1  # δ
    total = error.sum(0)  # [C]
    return torch.cat([((error.T @ samples - total[:, None] * shift) * scale).flatten(), total])

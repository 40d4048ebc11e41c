"""Limited-memory BFGS: products with an approximate Hessian, from a few pairs of steps and gradient changes."""

from collections import deque

import torch
from torch import Tensor

LEAST = 1e-3  # of the initial curvature σ


class BFGS:
    """The BFGS matrix B of the newest m pairs (s, y), in compact form.

    B v = σ v − [Y σS] M⁻¹ [Yᵀ v; σSᵀ v] with M = [[−D, Lᵀ], [L, σSᵀS]], D and L the diagonal and the strictly lower
    part of SᵀY, and σ = yᵀs/sᵀs of the newest pair, at least 1e-3 (Byrd, Nocedal & Schnabel 1994, theorem 2.3;
    DeltaGrad, arXiv:2006.14755, algorithm 2).

    >>> hessian = BFGS(pairs=2)
    >>> hessian.push(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0]))
    True
    >>> hessian.product(torch.tensor([1.0, 1.0]))
    tensor([3., 3.])
    """

    def __init__(self, pairs: int):
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=pairs)

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def push(self, s: Tensor, y: Tensor) -> bool:
        """Add a step s [p] and the gradient's change y [p]; return False for sᵀy ≤ 0, which is dropped.

        With such a pair B would not stay positive definite.
        """
        curvature = s @ y
        if not curvature > 0:
            return False
        self._pairs.append((s, y))
        self._sigma = max((curvature / (s @ s)).item(), LEAST)

        # [Y σS] M⁻¹ is the same for every v until the next pair.
        steps = torch.stack([s for s, _ in self._pairs])  # Sᵀ [m, p]
        changes = torch.stack([y for _, y in self._pairs])  # Yᵀ [m, p]
        products = steps @ changes.T  # SᵀY [m, m]
        lower = products.tril(-1)  # L
        diagonal = products.diagonal().diag()  # D
        squares = self._sigma * (steps @ steps.T)  # σSᵀS
        upper_half = torch.cat([-diagonal, lower.T], 1)
        lower_half = torch.cat([lower, squares], 1)
        middle = torch.cat([upper_half, lower_half])  # M [2m, 2m]
        self._right = torch.cat([changes, self._sigma * steps])  # [Y σS]ᵀ [2m, p]
        self._left = torch.linalg.solve(middle, self._right).T  # [Y σS] M⁻¹ [p, 2m], as M is symmetric
        return True

    def product(self, v: Tensor) -> Tensor:
        """Return B v [p]; needs at least one pair."""
        correction = self._left @ (self._right @ v)
        return self._sigma * v - correction

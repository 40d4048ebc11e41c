"""Selection as optimisation: the k largest scores, and orthogonal matching pursuit with non-negative weights."""

from typing import Protocol

import torch
from torch import Tensor

GROWTH = 64  # rows by which the room for a factor grows
DEPENDENT = 1e-12  # a pivot below this share of its diagonal is rounding: the atom lies in the span of the chosen ones


def largest(scores: Tensor, k: int) -> Tensor:
    """Return the positions of the k largest scores in descending order, equal scores by position.

    >>> largest(torch.tensor([1.0, 3.0, 3.0, 2.0]), 3)
    tensor([1, 2, 3])
    """
    return scores.sort(descending=True, stable=True).indices[:k]


class Cholesky:
    """The lower factor L of a symmetric positive definite matrix that gains and loses rows, O(m²) each.

    Args:
        like: gives the dtype.
    """

    def __init__(self, like: Tensor):
        self._store = like.new_zeros(0, 0)  # L and an identity below it: solved as it lies, where a slice is copied
        self._size = 0

    @property
    def lower(self) -> Tensor:
        """L, of shape [m, m]."""
        return self._store[: self._size, : self._size]

    def append(self, row: Tensor, diagonal: Tensor) -> bool:
        """Border the matrix with ``row`` [m] and ``diagonal``; return False, unchanged, if it would turn singular."""
        m = self._size
        new = self._forward(row)  # L l = row
        pivot = diagonal - new @ new
        if pivot <= DEPENDENT * diagonal:
            return False
        if m == len(self._store):
            self._store = torch.block_diag(self._store, torch.eye(GROWTH).to(row))
        self._store[m, :m], self._store[m, m] = new, pivot.sqrt()
        self._size = m + 1
        return True

    def remove(self, i: int) -> None:
        """Delete row and column i: the block T right of and below it becomes the factor of T Tᵀ + t tᵀ, t = L[i+1:, i].

        With T p = t and s_j = 1 + p_1² + … + p_j², the factor of I + p pᵀ is known in closed form, and

            column j of the new factor = sqrt(s_j / s_{j−1}) T_j + p_j / sqrt(s_j s_{j−1}) Σ_{l>j} p_l T_l .
        """
        m, lower = self._size, self.lower
        left, t, tail = lower[i + 1 :, :i].clone(), lower[i + 1 :, i], lower[i + 1 :, i + 1 :]
        p = torch.linalg.solve_triangular(tail, t[:, None], upper=False)[:, 0]  # [m−i−1]
        s = 1 + p.square().cumsum(0)
        before = s - p.square()  # s_{j−1}
        scaled = tail * p
        after = scaled.sum(dim=1, keepdim=True) - scaled.cumsum(dim=1)  # Σ_{l>j} p_l T_l
        updated = tail * (s / before).sqrt() + after * (p / (s * before).sqrt())
        lower[i : m - 1, :i], lower[i : m - 1, i : m - 1] = left, updated.tril()
        self._store[m - 1, :m] = 0
        self._store[m - 1, m - 1] = 1
        self._size = m - 1

    def solve(self, right: Tensor) -> Tensor:
        """Return x [m] with L Lᵀ x = right."""
        padded = self._padded(self._forward(right))
        return torch.linalg.solve_triangular(self._store.T, padded, upper=True)[: self._size, 0]

    def _forward(self, right: Tensor) -> Tensor:
        """Return x [m] with L x = right."""
        return torch.linalg.solve_triangular(self._store, self._padded(right), upper=False)[: self._size, 0]

    def _padded(self, right: Tensor) -> Tensor:
        return torch.cat([right, right.new_zeros(len(self._store) - self._size)])[:, None]


class Atoms(Protocol):
    """Vectors g_1 … g_n and a target t, seen through inner products; S are the vectors chosen so far, in order."""

    def __len__(self) -> int:
        """Return n."""

    def correlation(self, weights: Tensor) -> Tensor:
        """<g_j, t − Σ_{i∈S} v_i g_i> of every j [n], in any precision; v is ``weights`` [m]."""

    def append(self, j: int) -> tuple[Tensor, Tensor]:
        """Choose g_j; return <g_i, g_j> for all i ∈ S, j itself last [m], and <g_j, t>, in float64."""

    def keep(self, places: Tensor) -> None:
        """Drop all of S but what stands at ``places``, ascending [m]."""


def matching_pursuit(atoms: Atoms, energy: Tensor, k: int, *, lam: float, eps: float) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit with non-negative weights, from inner products alone.

    Minimise E(v) = ‖Σ_i v_i g_i − t‖² + λ‖v‖² over v ≥ 0 with at most k non-zeros. Each step adds the atom that
    correlates most with the residual, <g_j, t − Σ v_i g_i>, and solves for the weights of all chosen atoms; if some
    would turn negative, it walks towards the solution, drops the first atom to reach zero, and solves again
    (Lawson and Hanson's rule), so a place becomes free. It stops early when E ≤ ε‖t‖², when no correlation exceeds
    ε times the first, or when rounding keeps E from falling. One correlation and O(k²) a step, and k² numbers.

    Args:
        atoms: the vectors and the target, none chosen yet.
        energy: ‖t‖², a float64 scalar tensor.
        k: the largest number of atoms.
        lam: λ ≥ 0.
        eps: ε > 0.

    Returns:
        The atoms, int64 [m] with m ≤ k in the order of their choice, and their weights v > 0, float64 [m].
    """
    factor, free = Cholesky(energy), torch.ones(len(atoms), dtype=torch.bool)
    chosen, weights, target = torch.empty(0, dtype=torch.int64), energy.new_empty(0), energy.new_empty(0)
    error, last = energy, energy + torch.inf  # E of this step and of the one before
    correlation = atoms.correlation(weights)  # [n]
    floor = eps * correlation.max().clamp(min=0)
    while len(chosen) < k and eps * energy < error < last:
        best, j = correlation.where(free, -torch.inf).max(dim=0)
        if best <= floor:
            break
        free[j] = False
        inner, aim = atoms.append(int(j))
        if not factor.append(inner[:-1], inner[-1] + lam):
            atoms.keep(torch.arange(len(chosen)))
            continue
        chosen, target = torch.cat([chosen, j[None]]), torch.cat([target, aim[None]])
        kept, weights = _solve_nonnegative(factor, target, weights)
        if len(kept) < len(chosen):
            atoms.keep(kept)
            free[chosen] = True
            chosen, target = chosen[kept], target[kept]
            free[chosen] = False
        error, last = energy - target @ weights, error
        correlation = atoms.correlation(weights)
    return chosen, weights


def _solve_nonnegative(factor: Cholesky, right: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that keep a positive weight and their weights, starting from ``weights`` and 0 for the last."""
    kept = torch.arange(len(right))
    weights = torch.cat([weights, weights.new_zeros(1)])
    solution = factor.solve(right)
    while not (solution > 0).all():
        share = (weights / (weights - solution)).nan_to_num(0.0)  # of the way until each reaches zero; 0/0 is there
        share = share.where(solution <= 0, torch.inf)
        first = int(share.argmin())
        weights = weights + share[first] * (solution - weights)
        factor.remove(first)
        rest = torch.arange(len(kept)) != first
        kept, weights = kept[rest], weights[rest]
        solution = factor.solve(right[kept])
    return kept, solution

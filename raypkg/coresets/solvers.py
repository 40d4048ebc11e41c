"""Selection by scores, the largest or a draw, and by optimisation: matching pursuit with non-negative weights."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.linalg import solve_triangular

AT_ONCE = 16  # values computed together, or more: a product of fewer rows takes nearly as long
GROWTH = 64  # rows by which the room for a factor grows
CERTAIN = 1e-9  # a probability this near to 1 is 1
DEPENDENT = 1e-12  # a pivot below this share of its diagonal is rounding: the atom lies in the span of the chosen ones


def largest(scores: Tensor, k: int) -> Tensor:
    """Return the positions of the k largest scores in descending order, equal scores by position.

    >>> largest(torch.tensor([1.0, 3.0, 3.0, 2.0]), 3)
    tensor([1, 2, 3])
    """
    order = scores.sort(descending=True, stable=True).indices
    return order[:k]


def largest_bounded(
    bounds: Tensor, values: Callable[[Tensor], Tensor], k: int, *, at_most: int
) -> tuple[Tensor, Tensor] | None:
    """Return the positions of the k largest values, in the order of ``largest``, and the values, computing few others.

    Values are computed from the largest bound on, until k of them exceed every bound that is left.

    Args:
        bounds: no value exceeds its own [n].
        values: the values of positions, int64 [b].
        k: 1 … n.
        at_most: how many values to compute; return None if they do not suffice.

    >>> x = torch.tensor([1.0, 3.0, 3.0, 2.0])
    >>> largest_bounded(x + 1.5, lambda some: x[some], 2, at_most=4)
    (tensor([1, 2]), tensor([3., 3.]))
    """
    falling = bounds.sort(descending=True)
    known = bounds.new_empty(0)
    least = -torch.inf  # the k-th largest value so far
    while rivals := int((falling.values[len(known) :] >= least).sum()):
        start = len(known)
        end = start + min(rivals, max(k, start, AT_ONCE))
        if end > at_most:
            return None
        some = falling.indices[start:end]
        known = torch.cat([known, values(some)])
        least = float(known.topk(k).values[-1])
    seen, order = falling.indices[: len(known)].sort()
    known = known[order]
    best = largest(known, k)
    return seen[best], known[best]


def draw_in_proportion(scores: Tensor, k: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw k positions without replacement, each with a probability in proportion to its score, but at most 1.

        π_i = min(1, c · s_i),  Σ π_i = k

    Systematic sampling: the π_i stand end to end in a random order, and every whole number past a random start picks
    one. Where fewer than k scores are above 0, all of those are drawn, and as many of the others as are missing, with
    equal probabilities.

    Args:
        scores: s ≥ 0, finite [n].
        k: 1 … n.
        rng: draws.

    Returns:
        The positions, ascending, int64 [k], and their π, float64 [k].

    >>> draw_in_proportion(torch.tensor([0.0, 9.0, 1.0]), 2, torch.Generator().manual_seed(0))[0]
    tensor([1, 2])
    """
    probabilities = _probabilities(scores.double(), k)
    order = torch.randperm(len(scores), generator=rng)
    shuffled = probabilities[order]
    always = order[shuffled == 1]
    rest = order[(shuffled > 0) & (shuffled < 1)]
    missing = k - len(always)
    ends = probabilities[rest].cumsum(0)  # of the intervals that stand end to end
    start = torch.rand((), generator=rng, dtype=torch.float64)
    marks = start + torch.arange(missing)
    hit = torch.searchsorted(ends, marks, right=True).clamp(max=len(rest) - 1)
    chosen = torch.cat([always, rest[hit]]).sort().values
    return chosen, probabilities[chosen]


def _probabilities(scores: Tensor, k: int) -> Tensor:
    """Return π [n]: in proportion to the scores as far as none exceeds 1."""
    positive = scores > 0
    if positive.sum() < k:
        others = ~positive
        missing = k - positive.sum()
        return torch.where(positive, 1.0, missing.double() / others.sum())
    probabilities = torch.zeros_like(scores)
    open_ = positive  # whose share is below 1 as far as is known
    while True:
        left = k - (positive & ~open_).sum()
        share = scores * (left / scores[open_].sum())
        probabilities = torch.where(open_, share, positive.double())
        full = open_ & (probabilities >= 1 - CERTAIN)
        if not full.any():
            return probabilities
        open_ = open_ & ~full


class Cholesky:
    """The lower factor L of a symmetric positive definite matrix that gains and loses rows, O(m²) each.

    Args:
        like: gives the dtype.
    """

    def __init__(self, like: Tensor):
        # L in the upper left corner, an identity below it: the system that is solved is the whole store, which is
        # contiguous, where a slice [m, m] of it would be copied at every step. The identity rows meet zeros.
        self._store = like.new_zeros(0, 0)
        self._size = 0

    @property
    def lower(self) -> Tensor:
        """L, of shape [m, m]."""
        m = self._size
        return self._store[:m, :m]

    def append(self, row: Tensor, diagonal: Tensor) -> bool:
        """Border the matrix with ``row`` [m] and ``diagonal``; return False, unchanged, if it would turn singular."""
        m = self._size
        bordering = self._forward(row)  # l with L l = row [m]
        pivot = diagonal - bordering @ bordering
        if pivot <= DEPENDENT * diagonal:
            return False
        if m == len(self._store):
            self._enlarge(row)
        self._store[m, :m] = bordering
        self._store[m, m] = pivot.sqrt()
        self._size = m + 1
        return True

    def remove(self, i: int) -> None:
        """Delete row and column i: the block T right of and below it becomes the factor of T Tᵀ + t tᵀ, t = L[i+1:, i].

        With T p = t and s_j = 1 + p_1² + … + p_j², the factor of I + p pᵀ is known in closed form, and

            column j of the new factor = sqrt(s_j / s_{j−1}) T_j + p_j / sqrt(s_j s_{j−1}) Σ_{l>j} p_l T_l .
        """
        last = self._size - 1
        lower = self.lower
        below = lower[i + 1 :]
        left = below[:, :i].clone()  # moves up by one row: a copy, because both places overlap
        t = below[:, i]
        block = below[:, i + 1 :]  # T

        p = solve_triangular(block, t[:, None], upper=False)[:, 0]  # [m−i−1]
        squares = p.square()
        s = 1 + squares.cumsum(0)
        before = s - squares  # s_{j−1}
        scaled = block * p  # column l is p_l T_l
        total = scaled.sum(dim=1, keepdim=True)
        after = total - scaled.cumsum(dim=1)  # column j is Σ_{l>j} p_l T_l
        stretch = (s / before).sqrt()
        mixing = p / (s * before).sqrt()
        updated = block * stretch + after * mixing

        lower[i:last, :i] = left
        lower[i:last, i:last] = updated.tril()  # above the diagonal stands rounding
        self._store[last, :last] = 0  # the row that became free is the identity's again
        self._store[last, last] = 1
        self._size = last

    def solve(self, right: Tensor) -> Tensor:
        """Return x [m] with L Lᵀ x = right."""
        middle = self._forward(right)  # Lᵀ x
        solution = solve_triangular(self._store.T, self._padded(middle), upper=True)
        return solution[: self._size, 0]

    def _forward(self, right: Tensor) -> Tensor:
        """Return x [m] with L x = right."""
        solution = solve_triangular(self._store, self._padded(right), upper=False)
        return solution[: self._size, 0]

    def _padded(self, right: Tensor) -> Tensor:
        room = len(self._store) - self._size
        column = torch.cat([right, right.new_zeros(room)])
        return column[:, None]

    def _enlarge(self, like: Tensor) -> None:
        identity = torch.eye(GROWTH).to(like)
        self._store = torch.block_diag(self._store, identity)


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
    factor = Cholesky(energy)
    free = torch.ones(len(atoms), dtype=torch.bool)  # whether an atom may still be chosen [n]
    chosen = torch.empty(0, dtype=torch.int64)  # S [m]
    weights = energy.new_empty(0)  # v [m]
    target = energy.new_empty(0)  # <g_i, t> of each i ∈ S [m]
    error = energy  # E of this step; with v = 0, ‖t‖²
    last = energy + torch.inf  # E of the step before
    correlation = atoms.correlation(weights)  # [n]
    first = correlation.max()
    floor = eps * first.clamp(min=0)
    enough = eps * energy
    while len(chosen) < k and enough < error < last:
        eligible = correlation.where(free, -torch.inf)
        best, j = eligible.max(dim=0)
        if best <= floor:
            break
        free[j] = False
        inner, aim = atoms.append(int(j))
        diagonal = inner[-1] + lam
        if not factor.append(inner[:-1], diagonal):
            atoms.keep(torch.arange(len(chosen)))  # it adds nothing to S: passed over for good
            continue
        chosen = torch.cat([chosen, j[None]])
        target = torch.cat([target, aim[None]])
        kept, weights = _solve_nonnegative(factor, target, weights)
        if len(kept) < len(chosen):
            atoms.keep(kept)
            free[chosen] = True  # what was dropped may come again
            chosen = chosen[kept]
            target = target[kept]
            free[chosen] = False
        last = error
        error = energy - target @ weights  # E at the minimum over S, where (G Gᵀ + λI) v = G t
        correlation = atoms.correlation(weights)
    return chosen, weights


def _solve_nonnegative(factor: Cholesky, right: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that keep a positive weight and their weights, starting from ``weights`` and 0 for the last."""
    kept = torch.arange(len(right))
    weights = torch.cat([weights, weights.new_zeros(1)])
    solution = factor.solve(right)
    while not (solution > 0).all():
        # how far each weight may go towards the solution until it is zero; one that begins there, 0/0, may not go
        share = weights / (weights - solution)
        share = share.nan_to_num(0.0)
        share = share.where(solution <= 0, torch.inf)
        first = int(share.argmin())
        step = solution - weights
        weights = weights + share[first] * step
        factor.remove(first)
        rest = torch.arange(len(kept)) != first
        kept = kept[rest]
        weights = weights[rest]
        solution = factor.solve(right[kept])
    return kept, solution

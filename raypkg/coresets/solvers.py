"""Selection by scores, and orthogonal matching pursuit with non-negative weights over last-layer gradients.

The pursuit never asks for more than inner products of gradients, which the view gives in factored form.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import pad

from .gradients import HeadView

AT_ONCE = 16  # values computed together, or more: a product of fewer rows takes nearly as long
AHEAD = 32  # inner products computed at once: one product reads the view once for all of them
BLOCK = 512  # samples whose gradients are summed together: they stay in the cache
GROWTH = 64  # rows by which the room for a factor grows
STABLE = 1e9  # Σ‖g‖² of the chosen over λ up to which ``spanned_pursuit`` keeps enough digits
CERTAIN = 1e-9  # a probability this near to 1 is 1
DEPENDENT = 1e-12  # a pivot below this share of its diagonal is rounding: the atom lies in the span of the chosen ones


def largest(scores: Tensor, k: int) -> Tensor:
    """Return the positions of the k largest scores in descending order, equal scores by position."""
    order = scores.sort(descending=True, stable=True).indices
    return order[:k]


def largest_bounded(
    bounds: Tensor, values: Callable[[Tensor], Tensor], k: int, *, at_most: int
) -> tuple[Tensor, Tensor] | None:
    """Return positions and values of the k largest values, in the order of ``largest``, computing few others.

    ``values`` maps positions [b] to values, none above its bound [n]. They are computed from the largest bound on,
    until k of them exceed every bound that is left. None if ``at_most`` values do not suffice.
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
    """Draw k positions without replacement, each with a probability in proportion to its score s ≥ 0, but at most 1.

        π_i = min(1, c · s_i),  Σ π_i = k

    Systematic sampling: the π_i stand end to end in a random order, and every whole number past a random start picks
    one. If fewer than k scores are above 0, all of those are drawn, and the missing ones from the others with equal
    probabilities. Returns the positions, ascending, int64 [k], and their π, float64 [k].
    """
    probabilities = _probabilities(scores.double(), k)
    order = torch.randperm(len(scores), generator=rng).to(scores.device)
    shuffled = probabilities[order]
    always = order[shuffled == 1]
    rest = order[(shuffled > 0) & (shuffled < 1)]
    missing = k - len(always)
    ends = probabilities[rest].cumsum(0)  # of the intervals that stand end to end
    start = torch.rand((), generator=rng, dtype=torch.float64)
    marks = start + torch.arange(missing, device=scores.device)
    hit = torch.searchsorted(ends, marks, right=True).clamp(max=len(rest) - 1)
    chosen = torch.cat([always, rest[hit]]).sort().values
    return chosen, probabilities[chosen]


def _probabilities(scores: Tensor, k: int) -> Tensor:
    """Return π [n], in proportion to the scores as long as none exceeds 1."""
    positive = scores > 0
    if positive.sum() < k:
        others = ~positive
        missing = k - positive.sum()
        return torch.where(positive, 1.0, missing.double() / others.sum())
    below = positive  # scores whose π may be below 1
    while True:
        left = k - (positive & ~below).sum()
        share = scores * (left / scores[below].sum())
        probabilities = torch.where(below, share, positive.double())
        full = below & (probabilities >= 1 - CERTAIN)
        if not full.any():
            return probabilities
        below = below & ~full


def matching_pursuit(atoms: "BatchAtoms", energy: Tensor, k: int, *, lam: float, eps: float) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit with non-negative weights, from inner products alone.

    Minimise E(v) = ‖Σ_i v_i g_i − t‖² + λ‖v‖² over v ≥ 0 with at most k non-zeros. Each step adds the atom that
    correlates most with the residual, <g_j, t − Σ v_i g_i>, and solves for the weights of all chosen atoms; if some
    would turn negative, it walks towards the solution, drops the first atom to reach zero, and solves again
    (Lawson and Hanson's rule), so a place becomes free. It stops early when E ≤ ε‖t‖², when no correlation exceeds
    ε times the first, or when rounding keeps E from falling. One correlation and O(k²) a step, and k² numbers.

    ``atoms`` holds the g_i and t, none chosen yet; ``energy`` is ‖t‖², a float64 scalar. Returns the atoms, int64 [m]
    with m ≤ k in the order of their choice, and their weights v > 0, float64 [m].
    """
    factor = Cholesky(energy)
    free = torch.ones(len(atoms), dtype=torch.bool, device=energy.device)  # atoms that may still be chosen [n]
    chosen = torch.empty(0, dtype=torch.int64, device=energy.device)  # S [m]
    weights = energy.new_empty(0)  # v [m]
    target = energy.new_empty(0)  # <g_i, t> of each i ∈ S [m]
    error = energy  # E of this step; with v = 0, ‖t‖²
    last = energy + torch.inf  # E of the step before
    correlation = atoms.correlation(weights)  # [n]
    floor = eps * correlation.max().clamp(min=0)
    enough = eps * energy
    while len(chosen) < k and enough < error < last:
        best, j = correlation.where(free, -torch.inf).max(dim=0)
        if best <= floor:
            break
        free[j] = False
        inner, aim = atoms.append(int(j))
        if not factor.append(inner[:-1], inner[-1] + lam):
            atoms.keep(torch.arange(len(chosen), device=chosen.device))  # it adds nothing to S: passed over for good
            continue
        chosen = torch.cat([chosen, j[None]])
        target = torch.cat([target, aim[None]])
        stay, weights = _solve_nonnegative(factor, target, weights)
        if len(stay) < len(chosen):
            atoms.keep(stay)
            free[chosen] = True  # dropped atoms may come again
            chosen = chosen[stay]
            target = target[stay]
            free[chosen] = False
        last = error
        error = energy - target @ weights  # E at the minimum over S, where (G Gᵀ + λI) v = G t
        correlation = atoms.correlation(weights)
    return chosen, weights


def spanned_pursuit(
    view: HeadView, target: Tensor, k: int, *, lam: float, eps: float, together: int
) -> tuple[Tensor, Tensor]:
    """``matching_pursuit`` over single samples, for k beyond the p = (C−1)(D+1) numbers of a gradient, and λ > 0.

    All weights follow from one vector, v_i = <g_i, z> with (Σ_{i∈S} g_i g_iᵀ + λI) z = t, and the residual is λz. A
    sample that comes or goes changes the inverse by a matrix of rank one: O(p²), however many S holds. Each step adds
    the ``together`` samples that correlate most. Residuals p − e_y sum to 0, so C−1 numbers in an orthonormal basis
    stand for them.
    """
    num_classes, width = target.shape  # C, D+1
    centred = torch.eye(num_classes).to(target) - 1 / num_classes
    basis = torch.linalg.eigh(centred).eigenvectors[:, 1:]  # [C, C−1]
    aim = (basis.T @ target).flatten()  # t [p]
    inverse = torch.eye(len(aim)).to(aim) / lam
    z = aim / lam
    free = torch.ones_like(view.y, dtype=torch.bool)
    chosen = view.y.new_empty(0)  # S [m]
    residual = aim.new_empty(0, num_classes - 1)  # of S, in the basis
    features = aim.new_empty(0, width)  # of S, [h; 1]
    weights = aim.new_empty(0)  # v [m]
    error = aim @ aim
    last = error + torch.inf
    enough = eps * error
    floor = None
    while len(chosen) < k and enough < error < last:
        matrix = lam * basis @ z.view(num_classes - 1, width)  # M [C, D+1]
        correlation = view.project(matrix.to(view.features)).where(free, -torch.inf)
        best, picks = correlation.topk(min(together, k - len(chosen)))
        floor = eps * best[0].clamp(min=0) if floor is None else floor
        picks = picks[best > floor]
        if not len(picks):
            break
        free[picks] = False
        m = len(chosen)
        chosen = torch.cat([chosen, picks])
        residual = torch.cat([residual, view.residual[picks].double() @ basis])
        features = torch.cat([features, pad(view.features[picks].double(), (0, 1), value=1.0)])
        weights = pad(weights, (0, len(picks)))
        z = _change(inverse, z, residual[m:], features[m:], 1)
        solution = _through(residual, features, z)
        of_chosen = (residual * solution[:, None]).T @ features  # Σ v_i g_i
        z = z + inverse @ (aim - of_chosen.flatten() - lam * z)  # or the rounding of all changes would add up
        solution = _through(residual, features, z)
        while not (solution > 0).all():
            weights, out = _towards(solution, weights)
            z = _change(inverse, z, residual[out, None], features[out, None], -1)
            free[chosen[out]] = True  # it may come again
            stay = torch.arange(len(chosen), device=chosen.device) != out
            chosen, residual, features, weights = chosen[stay], residual[stay], features[stay], weights[stay]
            solution = _through(residual, features, z)
        weights = solution
        last = error
        error = lam * (aim @ z)
    return chosen, weights


def _through(residual: Tensor, features: Tensor, z: Tensor) -> Tensor:
    """Return <g_i, z> of gradients in two factors [m]."""
    matrix = z.view(residual.shape[1], -1)
    return (residual @ matrix).mul_(features).sum(dim=1)


def _change(inverse: Tensor, z: Tensor, residual: Tensor, features: Tensor, sign: int) -> Tensor:
    """Add gradients to Σ g_i g_iᵀ + λI, or take them away (``sign`` −1): change its inverse in place, and return z."""
    atoms = (residual[:, :, None] * features[:, None]).flatten(1)  # [·, p]
    images = atoms @ inverse
    inner = torch.eye(len(atoms)).to(atoms) + sign * (images @ atoms.T)
    moved = torch.linalg.solve(inner, images)
    inverse.addmm_(images.T, moved, alpha=-sign)
    return z - sign * (atoms @ z) @ moved


def _solve_nonnegative(factor: "Cholesky", right: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows with a positive weight and their weights, starting from ``weights`` and 0 for the last row."""
    stay = torch.arange(len(right), device=right.device)
    weights = torch.cat([weights, weights.new_zeros(1)])
    solution = factor.solve(right)
    while not (solution > 0).all():
        weights, first = _towards(solution, weights)
        factor.remove(first)
        rest = torch.arange(len(stay), device=stay.device) != first
        stay = stay[rest]
        weights = weights[rest]
        solution = factor.solve(right[stay])
    return stay, solution


def _towards(solution: Tensor, weights: Tensor) -> tuple[Tensor, int]:
    """Walk from the weights towards the solution until the first of them is zero; return where, and which it is."""
    share = weights / (weights - solution)
    share = share.nan_to_num(0.0)  # one that begins at zero, 0/0, may not go
    share = share.where(solution <= 0, torch.inf)
    first = int(share.argmin())
    return weights + share[first] * (solution - weights), first


class Cholesky:
    """The lower factor L of a symmetric positive definite matrix that gains and loses rows, O(m²) each."""

    def __init__(self, like: Tensor):
        # L in the upper left corner, an identity below it: the system that is solved is the whole store, which is
        # contiguous, where a slice [m, m] of it would be copied at every step. The identity rows meet zeros.
        self._store = like.new_zeros(0, 0)
        self._size = 0  # m

    @property
    def lower(self) -> Tensor:
        """L, of shape [m, m]."""
        return self._store[: self._size, : self._size]

    def append(self, row: Tensor, diagonal: Tensor) -> bool:
        """Border the matrix with ``row`` [m] and ``diagonal``; return False, unchanged, if it would turn singular."""
        m = self._size
        bordering = self._forward(row)  # l with L l = row [m]
        pivot = diagonal - bordering @ bordering
        if pivot <= DEPENDENT * diagonal:
            return False
        if m == len(self._store):
            self._store = torch.block_diag(self._store, torch.eye(GROWTH).to(row))
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
        updated = block * (s / before).sqrt() + after * (p / (s * before).sqrt())

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
        return torch.cat([right, right.new_zeros(room)])[:, None]


class BatchAtoms:
    """The mean gradients ḡ_B of disjoint batches of samples as atoms for a target t; S are the batches chosen so far.

    With M = t − Σ_{B∈S} v_B ḡ_B, <ḡ_B, M> is the mean of <g_i, M> over the batch, so no gradient but M is ever spelt
    out: n·C·D steps. The samples of S, at most ``capacity``, are kept in float64, in rows of their own; all others only
    in the view. ``batch`` is the batch of each sample, all numbers from 0 up, int64 [n]; ``target`` is t, float64
    [C, D+1].
    """

    def __init__(self, view: HeadView, batch: Tensor, target: Tensor, capacity: int):
        num_classes, width = target.shape  # C, D+1
        self.energy = target.square().sum()  # ‖t‖²
        self._view = view
        self._batch = batch
        self._target = target
        self._sizes = batch.bincount()  # |B|
        aims = view.project(target.to(view.features))  # <g_i, t> [n]
        self._aim = self._mean(aims)  # <ḡ_B, t> of every batch
        self._residual = target.new_empty(capacity, num_classes)  # of S's samples: (p − e_y) / |B| [·, C]
        self._features = target.new_empty(capacity, width)  # and [h; 1] [·, D+1]
        self._places = batch.new_empty(0)  # and the place in S of each row's batch [·]

    def __len__(self) -> int:
        return len(self._aim)

    def correlation(self, weights: Tensor) -> Tensor:
        """Return <ḡ_B, M> of every batch, given v."""
        residual, features = self._chosen
        weighted = residual * weights[self._places, None]
        matrix = self._target - weighted.T @ features  # M [C, D+1]
        return self._mean(self._view.project(matrix.to(self._aim)))

    def append(self, j: int) -> tuple[Tensor, Tensor]:
        """Choose ḡ_j; return its inner products with S, itself last, and with t, in float64."""
        members = (self._batch == j).nonzero()[:, 0]
        old = len(self._places)
        place = int(self._places[-1]) + 1 if old else 0
        rows = slice(old, old + len(members))
        self._residual[rows] = self._view.residual[members].double() / len(members)
        self._features[rows, :-1] = self._view.features[members].double()
        self._features[rows, -1] = 1
        self._places = torch.cat([self._places, torch.full_like(members, place)])

        residual, features = self._chosen
        new_residual = residual[rows]
        new_features = features[rows]
        inner = (residual @ new_residual.T) * (features @ new_features.T)  # of S's samples with those of B [·, |B|]
        by_place = inner.new_zeros(place + 1)
        by_place.index_add_(0, self._places, inner.sum(dim=1))
        aim = new_residual * (new_features @ self._target.T)
        return by_place, aim.sum()

    def keep(self, places: Tensor) -> None:
        """Drop all of S except the batches at ``places``, ascending."""
        rows = torch.isin(self._places, places).nonzero()[:, 0]
        count = len(rows)
        self._residual[:count] = self._residual[rows]
        self._features[:count] = self._features[rows]
        self._places = torch.searchsorted(places, self._places[rows])  # renumbered without gaps

    def ranked(self, first: Tensor) -> Tensor:
        """Return all batches: ``first``, then the others by their correlation with t."""
        others = self._aim.index_fill(0, first, -torch.inf)
        rest = largest(others, len(self) - len(first))
        return torch.cat([first, rest])

    @property
    def _chosen(self) -> tuple[Tensor, Tensor]:
        count = len(self._places)
        return self._residual[:count], self._features[:count]

    def _mean(self, values: Tensor) -> Tensor:
        """Return the mean over each batch of a value of each sample."""
        sums = values.new_zeros(len(self._sizes))
        sums.index_add_(0, self._batch, values)
        return sums / self._sizes


class MeanAtoms(BatchAtoms):
    """Batches whose mean gradients are spelt out, float64 [B, C(D+1)]: faster where that is less than the view."""

    def __init__(self, means: Tensor, target: Tensor):
        self.energy = target.square().sum()
        self._means = means
        self._aim = means @ target.flatten()
        self._members = torch.empty(0, dtype=torch.int64, device=means.device)  # S
        self._inner = means.new_empty(0, len(means))  # of S with all batches [m, B]

    def correlation(self, weights: Tensor) -> Tensor:
        """Return <ḡ_B, M> of every batch, given v."""
        return self._aim - weights @ self._inner

    def append(self, j: int) -> tuple[Tensor, Tensor]:
        """Choose ḡ_j; return its inner products with S, itself last, and with t."""
        inner = self._means @ self._means[j]
        self._inner = torch.cat([self._inner, inner[None]])
        self._members = torch.cat([self._members, self._members.new_tensor([j])])
        return inner[self._members], self._aim[j]

    def keep(self, places: Tensor) -> None:
        """Drop all of S except the batches at ``places``, ascending."""
        self._members = self._members[places]
        self._inner = self._inner[places]


def batch_means(view: HeadView, order: Tensor, size: int) -> Tensor:
    """Return ḡ_B of batches of ``size`` samples in this order, the last with what is left over, float64 [B, C(D+1)]."""
    means = []
    count = len(order) // size  # whole batches
    at_once = max(1, BLOCK // size)
    for start in range(0, count, at_once):
        end = min(start + at_once, count)
        part = view[order[start * size : end * size]]
        residual = part.residual.view(end - start, size, -1)
        features = part.features.view(end - start, size, -1)
        of_weight = residual.transpose(1, 2) @ features  # [·, C, D]
        of_bias = residual.sum(dim=1)[..., None]
        means.append(torch.cat([of_weight, of_bias], dim=2).flatten(1) / size)
    if count * size < len(order):
        rest = view[order[count * size :]]
        means.append(rest.mean().flatten()[None])
    return torch.cat(means).double()


class SampleAtoms(BatchAtoms):
    """Single samples as atoms. Few will be chosen: their inner products with all others are cached.

    <g_j, M> = <g_j, t> − Σ_{i∈S} v_i <g_i, g_j> takes n·|S| steps. The inner products of a sample are n·(C + D) steps,
    bound by reading the view; those of the ``AHEAD`` samples that correlate most, likely the next choices, are computed
    together.
    """

    def __init__(self, view: HeadView, batch: Tensor, target: Tensor, capacity: int):
        super().__init__(view, batch, target, capacity)
        self._latest = self._aim  # correlation
        self._samples = batch.new_empty(0)  # S
        self._gram = self._aim.new_empty(capacity + AHEAD, len(view))  # row i: <g_i, g_j> of one sample with every j
        self._filled = 0  # rows in use
        self._row = torch.full_like(batch, -1)  # the row of each sample, −1 without one [n]

    def correlation(self, weights: Tensor) -> Tensor:
        """Return <g_j, M> of every sample, given v."""
        by_row = self._aim.new_zeros(self._filled)  # 0 in the rows of samples that are not in S
        by_row[self._row[self._samples]] = weights.to(by_row)
        self._latest = self._aim - by_row @ self._gram[: self._filled]
        return self._latest

    def append(self, j: int) -> tuple[Tensor, Tensor]:
        """Choose g_j; return its inner products with S, itself last, and with t."""
        if self._row[j] < 0:
            if self._filled + AHEAD > len(self._gram):  # no room: keep S, whose rows are needed, and drop the guesses
                self._fill(0, self._samples, self._gram[self._row[self._samples]])
            likely = self._latest.where(self._row < 0, -torch.inf)
            likely[j] = torch.inf
            samples = likely.topk(min(AHEAD, len(likely))).indices
            self._fill(self._filled, samples, self._view[samples].inner(self._view))
        self._samples = torch.cat([self._samples, self._samples.new_tensor([j])])
        return super().append(j)

    def keep(self, places: Tensor) -> None:
        """Drop all of S except the samples at ``places``, ascending."""
        super().keep(places)
        self._samples = self._samples[places]

    def _fill(self, start: int, samples: Tensor, gram: Tensor) -> None:
        """Replace all rows from ``start`` on."""
        end = start + len(samples)
        self._row[self._row >= start] = -1
        self._row[samples] = torch.arange(start, end, device=samples.device)
        self._gram[start:end] = gram
        self._filled = end

"""Facility location: the k samples (medoids) whose gradients are closest to all gradients.

    S = argmin Σ_i min_{j∈S} ‖g_i − g_j‖,  |S| = k

i runs over the samples to cover, by default those that the medoids j are chosen from.

Greedy choice gains Σ_i max(0, min_{s∈S} ‖g_i − g_s‖ − ‖g_i − g_j‖) by one more medoid j. The gain of a sample never
grows as S grows (the objective is submodular), so an old gain bounds the present one from above. Logit gradients alone
are the gradients of a view without features, [n, 0].
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import torch
from torch import Tensor

from raypkg.core.errors import UserError

from .gradients import HeadView

PRODUCT = 128  # rows that one matrix product computes; always that many, because another shape may round otherwise
REFRESH = 16  # gains brought up to date at once where all rows are kept: a step rarely needs more
TIED = 8  # gains this many units in the last place apart are equal: they are sums in an order that may change


def facility_location(view: HeadView, k: int, *, memory: int, covered: HeadView | None = None) -> Tensor:
    """Choose medoids by lazy greedy: the largest gain each time.

    Two samples far from all others gain the same, whichever is taken: gains that are equal up to rounding go to the
    sample with the least Σ_i ‖g_i − g_j‖, and then by position.

    Takes n²(C + D)/2 multiplications if all n² distances fit in ``memory``; if none do, four times as many, and
    128·n(C + D) more for about every further medoid. Peak memory is ``memory`` and about ten blocks of 128·n numbers.
    With m other samples to cover, n·m and 128·m take the place of n²/2 and 128·n.

    Args:
        view: n samples.
        k: 1 … n.
        memory: bytes for the distances that are kept; the medoids do not depend on it.
        covered: the samples to be close to; None = the view.

    Returns:
        The medoids in the order of their choice, int64 [k].

    Raises:
        UserError: k or memory out of range.
    """
    _check(view, k)
    rows = _Rows(view, view if covered is None else covered, memory)
    totals: list[float] = []  # Σ_i ‖g_i − g_j‖ of each j
    for block in rows.blocks():
        totals += block.sum(dim=1).tolist()

    # without a medoid every sample is infinitely far from one, so the first is the one of least total distance
    first = totals.index(min(totals))
    medoids = [first]
    nearest = rows(torch.tensor([first]))[0]  # distance of each sample to its medoid [n]

    bounds: list[_Bound] = []
    for block in rows.blocks():
        for gain in _gains(nearest, block).tolist():
            j = len(bounds)
            bounds.append(_Bound(-gain, totals[j], j))
    del bounds[first]
    heapify(bounds)
    while len(medoids) < k:
        medoid, row = _largest_gain(rows, nearest, bounds)
        medoids.append(medoid)
        nearest = nearest.minimum(row)
    return torch.tensor(medoids)


def stochastic_facility_location(
    view: HeadView,
    k: int,
    *,
    sample: int,
    rng: torch.Generator,
    memory: int,
    covered: HeadView | None = None,
) -> Tensor:
    """Choose medoids by stochastic greedy: each time the best of ``sample`` random candidates (arXiv:1409.7938).

    Args:
        view: n samples.
        k: 1 … n.
        sample: candidates a step, at least 1; ⌈n/k · ln(1/ε)⌉ are within 1 − 1/e − ε of the optimum in expectation.
        rng: draws the candidates.
        memory: as in ``facility_location``.
        covered: as in ``facility_location``.

    Returns:
        The medoids in the order of their choice, int64 [k].

    Raises:
        UserError: k, sample or memory out of range.
    """
    _check(view, k)
    if sample < 1:
        raise UserError(f"{sample} candidates a step: must be 1 or more")
    covered = view if covered is None else covered
    rows = _Rows(view, covered, memory)
    left = torch.arange(len(view))
    nearest = torch.full_like(covered.logits[:, 0], torch.inf)  # distance of each sample to its medoid [n]
    medoids = []
    for _ in range(k):
        drawn = torch.randperm(len(left), generator=rng)[:sample]
        candidates = left[drawn].sort().values  # of equal candidates the first one wins
        medoid, nearest = _smallest_sum(rows, nearest, candidates)
        medoids.append(medoid)
        left = left[left != medoid]
    return torch.tensor(medoids)


def cluster_shares(view: HeadView, medoids: Tensor, *, covered: HeadView | None = None) -> Tensor:
    """Count the covered samples nearest to each medoid.

    One that is, up to rounding, as near to m medoids counts 1/m for each.

    Rounding is judged by squared distances ‖a‖² − 2<a, b> + ‖b‖², whose errors are of the size of their terms, not of
    the distance: a medoid counts as nearest if its square may be as low as the least one may be high.

    Args:
        view: what the medoids were chosen from.
        medoids: int64 [k].
        covered: n samples; None = the view.

    Returns:
        The counts, float64 [k], with sum n.
    """
    covered = view if covered is None else covered
    centres = view[medoids]
    centre_squares = centres.norms().square()  # [k]
    shares = torch.zeros(len(medoids), dtype=torch.float64)
    for block in _blocks(0, len(covered)):
        members = covered[block]
        member_squares = members.norms().square()  # [b]
        least = members.distances(centres).square()  # that the squared distances can be [b, k]
        terms = member_squares[:, None] + centre_squares  # what rounds [b, k]
        most = least + 2 * view.rounding * terms
        limit = most.min(dim=1, keepdim=True).values  # [b, 1]
        nearest = (least <= limit).double()  # 1 for each medoid that may be the nearest [b, k]
        ties = nearest.sum(dim=1, keepdim=True)
        shares += (nearest / ties).sum(dim=0)
    return shares


class _Bound(NamedTuple):
    """The most that one more medoid may gain, negative because a heap has its smallest entry first.

    The order of the fields is the order of choice: the gain, then the total, then the position.
    """

    negative: float  # −gain
    total: float  # Σ_i ‖g_i − g_j‖
    sample: int  # j

    @property
    def preference(self) -> tuple[float, int]:
        """What decides between equal gains."""
        return self.total, self.sample


class _Rows:
    """Rows of the distances ‖g_i − g_j‖ [n, m], one for each j: as many as fit in ``memory`` bytes are kept.

    They are kept from the first on.

    Attributes:
        batch: how many to ask for at once; where some are missing, a whole product of them costs no more than one.
    """

    def __init__(self, view: HeadView, covered: HeadView, memory: int):
        if memory < 0:
            raise UserError(f"memory {memory} bytes: must be 0 or more")
        n = len(view)
        m = len(covered)
        row_bytes = m * view.logits.element_size()
        room = min(memory // row_bytes, n)
        self.batch = REFRESH if room == n else PRODUCT
        self._view = view
        self._covered = covered
        self._kept = view.logits.new_empty(room, m)
        for samples in _blocks(0, room):
            first = int(samples[0])
            end = first + len(samples)
            start = 0
            if covered is view:  # the distances to those before are in their rows
                start = first
                self._kept[first:end, :start] = self._kept[:start, first:end].T
            self._kept[first:end, start:] = self._computed(samples, start)

    def __call__(self, samples: Tensor) -> Tensor:
        """Return the distances of at most PRODUCT samples to all that are covered, [b, m]."""
        kept = samples < len(self._kept)
        if kept.all():
            return self._kept[samples]
        rows = self._kept.new_empty(len(samples), len(self._covered))
        rows[kept] = self._kept[samples[kept]]
        rows[~kept] = self._computed(samples[~kept])
        return rows

    def blocks(self) -> Iterator[Tensor]:
        """Yield all rows in order, PRODUCT or fewer at a time."""
        yield from self._kept.split(PRODUCT)
        for samples in _blocks(len(self._kept), len(self._view)):
            yield self._computed(samples)

    def _computed(self, samples: Tensor, start: int = 0) -> Tensor:
        """Return the distances to all that are covered from ``start`` on."""
        # filled up with the first one to the one shape of all products: a distance is then the same number each time
        missing = PRODUCT - len(samples)
        padded = torch.cat([samples, samples[:1].expand(missing)])
        covered = self._covered[start:] if start else self._covered  # which keeps what is computed of all of it
        distances = self._view[padded].distances(covered)
        return distances[: len(samples)]


def _largest_gain(rows: _Rows, nearest: Tensor, bounds: list[_Bound]) -> tuple[int, Tensor]:
    """Take the sample of the largest gain off the heap of bounds; return it and its row.

    Old gains are brought up to date from the largest on, until none that is left can beat what has been found.
    """
    rounding = torch.finfo(nearest.dtype).eps
    slack = 1 - TIED * rounding
    fresh: list[_Bound] = []
    tied: dict[_Bound, Tensor] = {}  # candidates of the largest gain, and their rows
    limit = torch.inf  # −gain up to which a candidate ties
    while bounds and bounds[0].negative < limit:
        count = min(rows.batch, len(bounds))
        stale = [heappop(bounds) for _ in range(count)]
        samples = torch.tensor([bound.sample for bound in stale])
        distances = rows(samples)  # [b, n]
        current = []
        for bound, gain in zip(stale, _gains(nearest, distances).tolist(), strict=True):
            current.append(_Bound(-gain, bound.total, bound.sample))
        fresh += current
        largest = min(current)
        limit = min(limit, largest.negative * slack)  # an equal gain may have come out this much smaller
        tied = {bound: row for bound, row in tied.items() if bound.negative <= limit}
        for i, bound in enumerate(current):
            if bound.negative <= limit:
                tied[bound] = distances[i]
    best = min(tied, key=lambda bound: bound.preference)
    for bound in fresh:
        if bound != best:
            heappush(bounds, bound)
    return best.sample, tied[best]


def _gains(nearest: Tensor, distances: Tensor) -> Tensor:
    """Return what each row of the distances [b, m] would take off Σ_i of the nearest ones, [b]."""
    return (nearest - distances).clamp_(min=0).sum(dim=1)


def _smallest_sum(rows: _Rows, nearest: Tensor, candidates: Tensor) -> tuple[int, Tensor]:
    """Return the candidate that leaves the smallest Σ_i min_{s∈S} ‖g_i − g_s‖, and what it leaves of each i."""
    medoid = -1
    least = torch.inf
    left = nearest
    for block in candidates.split(PRODUCT):
        distances = rows(block).minimum(nearest)  # [b, n]
        sums = distances.sum(dim=1)  # [b]
        best = int(sums.argmin())
        if sums[best] < least:
            medoid = int(block[best])
            least = float(sums[best])
            left = distances[best]
    return medoid, left


def _blocks(start: int, end: int) -> Iterator[Tensor]:
    for first in range(start, end, PRODUCT):
        last = min(first + PRODUCT, end)
        yield torch.arange(first, last)


def _check(view: HeadView, k: int) -> None:
    if not 1 <= k <= len(view):
        raise UserError(f"{k} medoids: must be from 1 to the number of samples, {len(view)}")

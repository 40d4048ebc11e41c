"""Facility location: the k samples (medoids) whose gradients are closest to all gradients.

    S = argmin Σ_i min_{j∈S} ‖g_i − g_j‖,  |S| = k

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

PRODUCT = 128  # rows that one matrix product computes; always as many, because another shape may round otherwise
REFRESH = 16  # gains brought up to date at once where all rows are kept: a step rarely needs more


def facility_location(view: HeadView, k: int, *, memory: int) -> Tensor:
    """Choose medoids by lazy greedy: the largest gain each time.

    Two samples far from all others gain the same, whichever is taken: gains that are equal up to rounding go to the
    sample with the least Σ_i ‖g_i − g_j‖, and then by position.

    Takes n²(C + D) multiplications if all n² distances fit in ``memory``; if none do, twice as many, and 128·n(C + D)
    more for about every further medoid. Peak memory is ``memory`` and about ten blocks of 128·n numbers.

    Args:
        view: n samples.
        k: 1 … n.
        memory: bytes for the distances that are kept; the medoids do not depend on it.

    Returns:
        The medoids in the order of their choice, int64 [k].

    Raises:
        UserError: k or memory out of range.
    """
    _check(view, k)
    rows = _Rows(view, memory)
    totals = [total for block in rows.blocks() for total in block.sum(dim=1).tolist()]  # Σ_i ‖g_i − g_j‖ for each j
    medoids = [totals.index(min(totals))]
    nearest = rows(torch.tensor(medoids))[0]  # distance of each sample to its medoid [n]
    bounds = [_Bound(-torch.inf, total, j) for j, total in enumerate(totals) if j != medoids[0]]
    heapify(bounds)
    while len(medoids) < k:
        medoid, row = _largest_gain(rows, nearest, bounds)
        medoids.append(medoid)
        nearest = nearest.minimum(row)
    return torch.tensor(medoids)


def stochastic_facility_location(view: HeadView, k: int, *, sample: int, rng: torch.Generator, memory: int) -> Tensor:
    """Choose medoids by stochastic greedy: each time the best of ``sample`` random candidates (arXiv:1409.7938).

    Args:
        view: n samples.
        k: 1 … n.
        sample: candidates a step, at least 1; ⌈n/k · ln(1/ε)⌉ are within 1 − 1/e − ε of the optimum in expectation.
        rng: draws the candidates.
        memory: as in ``facility_location``.

    Returns:
        The medoids in the order of their choice, int64 [k].

    Raises:
        UserError: k, sample or memory out of range.
    """
    _check(view, k)
    if sample < 1:
        raise UserError(f"{sample} candidates a step: must be 1 or more")
    rows, left = _Rows(view, memory), torch.arange(len(view))
    nearest = torch.full_like(view.logits[:, 0], torch.inf)  # distance of each sample to its medoid [n]
    medoids = []
    for _ in range(k):
        candidates = left[torch.randperm(len(left), generator=rng)[:sample]].sort().values
        medoid, nearest = _smallest_sum(rows, nearest, candidates)
        medoids.append(medoid)
        left = left[left != medoid]
    return torch.tensor(medoids)


def cluster_shares(view: HeadView, medoids: Tensor) -> Tensor:
    """Count the samples nearest to each medoid; one that is, up to rounding, as near to m medoids counts 1/m for each.

    Returns:
        The counts, float64 [k], with sum n.
    """
    centres, shares = view[medoids], torch.zeros(len(medoids), dtype=torch.float64)
    for block in _blocks(0, len(view)):
        members = view[block]
        least = members.distances(centres).square()  # that the squares can be [b, k]
        squares = members.norms().square()[:, None] + centres.norms().square()
        most = least + 2 * view.rounding * squares
        nearest = (least <= most.min(dim=1, keepdim=True).values).double()
        shares += (nearest / nearest.sum(dim=1, keepdim=True)).sum(dim=0)
    return shares


class _Bound(NamedTuple):
    """The most that one more medoid may gain; a heap has the largest gain first."""

    negative: float  # −gain
    total: float  # Σ_i ‖g_i − g_j‖
    sample: int  # j


class _Rows:
    """Rows of the distances ‖g_i − g_j‖ [n, n]: as many as fit in ``memory`` bytes are kept, from the first on.

    Attributes:
        batch: how many to ask for at once; where some are missing, a whole product of them costs no more than one.
    """

    def __init__(self, view: HeadView, memory: int):
        if memory < 0:
            raise UserError(f"memory {memory} bytes: must be 0 or more")
        room = memory // (len(view) * view.logits.element_size())
        self.batch = REFRESH if room >= len(view) else PRODUCT
        self._view, self._kept = view, view.logits.new_empty(min(room, len(view)), len(view))
        for samples in _blocks(0, len(self._kept)):
            self._kept[samples[0] : samples[-1] + 1] = self._computed(samples)

    def __call__(self, samples: Tensor) -> Tensor:
        """Return the distances of at most PRODUCT samples to all, [b, n]."""
        kept = samples < len(self._kept)
        if kept.all():
            return self._kept[samples]
        rows = self._kept.new_empty(len(samples), len(self._view))
        rows[kept], rows[~kept] = self._kept[samples[kept]], self._computed(samples[~kept])
        return rows

    def blocks(self) -> Iterator[Tensor]:
        """Yield all rows in order, PRODUCT or fewer at a time."""
        yield from self._kept.split(PRODUCT)
        for samples in _blocks(len(self._kept), len(self._view)):
            yield self._computed(samples)

    def _computed(self, samples: Tensor) -> Tensor:
        padded = torch.cat([samples, samples[:1].expand(PRODUCT - len(samples))])
        return self._view[padded].distances(self._view)[: len(samples)]


def _largest_gain(rows: _Rows, nearest: Tensor, bounds: list[_Bound]) -> tuple[int, Tensor]:
    """Take the sample of the largest gain off the heap of bounds; return it and its row."""
    slack = 1 - 8 * torch.finfo(nearest.dtype).eps
    fresh: list[_Bound] = []
    tied: dict[_Bound, Tensor] = {}  # candidates of the largest gain, and their rows
    limit = torch.inf
    while bounds and bounds[0].negative < limit:
        stale = [heappop(bounds) for _ in range(min(rows.batch, len(bounds)))]
        distances = rows(torch.tensor([old.sample for old in stale]))  # [b, n]
        gains = (nearest - distances).clamp_(min=0).sum(dim=1)  # [b]
        new = [_Bound(-gain, old.total, old.sample) for gain, old in zip(gains.tolist(), stale, strict=True)]
        fresh += new
        limit = min(limit, min(new).negative * slack)
        tied = {bound: row for bound, row in tied.items() if bound.negative <= limit}
        tied |= {bound: distances[i] for i, bound in enumerate(new) if bound.negative <= limit}
    best = min(tied, key=lambda bound: bound[1:])
    for bound in fresh:
        if bound != best:
            heappush(bounds, bound)
    return best.sample, tied[best]


def _smallest_sum(rows: _Rows, nearest: Tensor, candidates: Tensor) -> tuple[int, Tensor]:
    """Return the candidate that leaves the smallest Σ_i min_{s∈S} ‖g_i − g_s‖, and what it leaves of each i."""
    medoid, least, left = -1, torch.inf, nearest
    for block in candidates.split(PRODUCT):
        distances = rows(block).minimum(nearest)  # [b, n]
        sums = distances.sum(dim=1)  # [b]
        best = int(sums.argmin())
        if sums[best] < least:
            medoid, least, left = int(block[best]), float(sums[best]), distances[best]
    return medoid, left


def _blocks(start: int, end: int) -> Iterator[Tensor]:
    for first in range(start, end, PRODUCT):
        yield torch.arange(first, min(first + PRODUCT, end))


def _check(view: HeadView, k: int) -> None:
    if not 1 <= k <= len(view):
        raise UserError(f"{k} medoids: must be from 1 to the number of samples, {len(view)}")

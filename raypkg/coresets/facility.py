"""Facility location: the k samples (medoids) whose gradients are closest to all gradients.

    S = argmin Σ_i min_{j∈S} ‖g_i − g_j‖,  |S| = k

i runs over the samples to cover, by default those that the medoids j are chosen from. Logit gradients alone are the
gradients of a view without features, [n, 0].
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .gradients import HeadView

PRODUCT = 128  # rows that one matrix product computes; always that many, because another shape may round otherwise
FEW = 32  # rows requested at once if all are cached: a step of the greedy choice rarely needs more
TIED = 8  # gains this many units in the last place apart are equal: they are sums in an order that may change


class Distances:
    """Rows of the distances ‖g_i − g_j‖ [n, m], one for each of n samples j to choose from (``view``).

    The m samples i are those to be close to (``covered``, None = the view). The first rows are cached, in ``memory``
    bytes; no distance depends on that.
    """

    def __init__(self, view: HeadView, covered: HeadView | None = None, *, memory: int):
        covered = view if covered is None else covered
        n, m = len(view), len(covered)
        self._room = min(memory // (m * view.logits.element_size()), n)  # cached rows
        self.batch = FEW if self._room == n else PRODUCT  # rows to request at once: a whole product costs no more
        self.view = view
        self.covered = covered
        self._cached: list[Tensor] = []  # blocks of PRODUCT rows, which the heap keeps for the next class
        self._rows: list[Tensor] = []  # views of their rows
        for first, end in _blocks(0, self._room):
            block = view.logits.new_empty(end - first, m)
            start = first if covered is view else 0
            self._block(first, end, start, out=block[:, start:])
            if start:  # by symmetry
                for columns, rows in zip(block.split(PRODUCT, dim=1), self._cached, strict=False):
                    columns.copy_(rows[:, first:end].T)
            self._cached.append(block)
            self._rows.extend(block)

    def __call__(self, samples: Tensor) -> Tensor:
        """Return the distances of at most PRODUCT samples to all covered ones, [b, m]."""
        positions = samples.tolist()
        if not positions:
            return self.view.logits.new_empty(0, len(self.covered))
        computed: Iterator[Tensor] = iter(())
        if max(positions) >= self._room:
            computed = iter(self._computed(samples[samples >= self._room]))
        return torch.stack([self._rows[i] if i < self._room else next(computed) for i in positions])

    def blocks(self) -> Iterator[Tensor]:
        """Yield all rows in order, PRODUCT or fewer at a time."""
        yield from self._cached
        for first, end in _blocks(self._room, len(self.view)):
            yield self._block(first, end)

    def _block(self, first: int, end: int, start: int = 0, *, out: Tensor | None = None) -> Tensor:
        """Return the rows from ``first`` to ``end``, of the samples covered from ``start`` on."""
        if end - first < PRODUCT:
            rows = self._computed(torch.arange(first, end, device=self.view.y.device), start)
            return rows if out is None else out.copy_(rows)
        return self.view[first:end].distances(self._from(start), out=out)  # no copy, unlike by positions

    def _computed(self, samples: Tensor, start: int = 0) -> Tensor:
        # Filled up with the first sample to the one shape of all products: a distance is the same number each time.
        filling = samples[:1].expand(PRODUCT - len(samples))
        padded = torch.cat([samples, filling])
        return self.view[padded].distances(self._from(start))[: len(samples)]

    def _from(self, start: int) -> HeadView:
        return self.covered[start:] if start else self.covered  # the whole view, with its cached norms


class KnownDistances(Distances):
    """Rows of distances that are all known, of any metric, [n, m]."""

    def __init__(self, rows: Tensor):
        self._known, self.batch = rows, FEW

    def __call__(self, samples: Tensor) -> Tensor:
        """Return the distances of samples to all covered ones, [b, m]."""
        return self._known.index_select(0, samples)

    def blocks(self) -> Iterator[Tensor]:
        """Yield all rows in order, PRODUCT or fewer at a time."""
        yield from self._known.split(PRODUCT)


def _blocks(start: int, end: int) -> Iterator[tuple[int, int]]:
    for first in range(start, end, PRODUCT):
        yield first, min(first + PRODUCT, end)


def facility_location(distances: Distances, k: int) -> Tensor:
    """Choose k medoids by lazy greedy, the largest gain each time; return them in the order of their choice, int64 [k].

    A further medoid j gains Σ_i max(0, min_{s∈S} ‖g_i − g_s‖ − ‖g_i − g_j‖). The objective is submodular: a gain never
    grows with S, so an old gain bounds the present one from above.

    Two samples far from all others gain the same, whichever is taken: gains that are equal up to rounding go to the
    sample with the least Σ_i ‖g_i − g_j‖, and then by position.

    Takes n²(C + D)/2 multiplications if all n² distances are cached; if none are, four times as many, and 128·n(C + D)
    more for every few medoids. Peak memory is that of the cache and at most ten blocks of 128·n numbers. With m other
    samples to cover, n·m and 128·m take the place of n²/2 and 128·n. Which rows a choice needs depends on the gains,
    so each choice reads them on the host.
    """
    totals = torch.cat([block.sum(dim=1) for block in distances.blocks()])  # Σ_i ‖g_i − g_j‖ of each j

    # Without a medoid every sample is infinitely far from one, so the first is the one of least total distance.
    medoids = [int(totals.argmin())]
    nearest = distances(totals.new_tensor(medoids, dtype=torch.int64))[0]  # of each sample to its medoid [n]
    slack = 1 - TIED * torch.finfo(nearest.dtype).eps  # an equal gain may have come out this much smaller
    tiny = torch.finfo(nearest.dtype).tiny  # a bound below is 0, and the gain itself

    bounds = torch.cat([_gains(nearest, block) for block in distances.blocks()])  # of the gain of each sample [n]
    candidates, rows, beyond = _front(distances, bounds)
    while len(medoids) < k:
        # Update the gains of the candidates until no other sample can tie with the largest, or all of them tie.
        while True:
            gains = _gains(nearest, rows)
            values = gains.tolist()
            limit = max(max(values) * slack, tiny)
            if beyond < limit or min(values) >= limit:
                break
            bounds.scatter_(0, candidates, gains)  # a medoid gains 0
            candidates, rows, beyond = _front(distances, bounds)

        tied = [i for i, gain in enumerate(values) if gain >= limit]
        if len(tied) == 1 and beyond < limit:
            medoid = int(candidates[tied[0]])
            row = rows[tied[0]]
        else:
            bounds[candidates.new_tensor(medoids)] = -torch.inf
            rivals = (bounds >= limit).nonzero()[:, 0]
            for some in rivals.split(PRODUCT):
                bounds[some] = _gains(nearest, distances(some))
            equal = bounds >= bounds.max() * slack  # all samples that are left, if none gains anything
            medoid = int(totals.where(equal, torch.inf).argmin())
            row = distances(candidates.new_tensor([medoid]))[0]
        medoids.append(medoid)
        nearest = nearest.minimum(row)
    return candidates.new_tensor(medoids)


def _front(distances: Distances, bounds: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the samples with the largest bounds, their rows [b, n], and the largest bound of all others."""
    count = min(distances.batch, len(bounds) - 1)
    values, samples = bounds.topk(count + 1)
    return samples[:count], distances(samples[:count]), float(values[count])


def _gains(nearest: Tensor, distances: Tensor) -> Tensor:
    """Return by how much each row of the distances [b, m] would lower Σ_i of the nearest ones, [b]."""
    return (nearest - distances).clamp_(min=0).sum(dim=1)


def stochastic_facility_location(distances: Distances, k: int, *, sample: int, rng: torch.Generator) -> Tensor:
    """Choose k medoids by stochastic greedy: each time the best of ``sample`` random candidates (arXiv:1409.7938).

    ⌈n/k · ln(1/ε)⌉ candidates a step are within 1 − 1/e − ε of the optimum in expectation.
    """
    left = torch.arange(len(distances.view), device=distances.view.y.device)
    nearest = torch.full_like(distances.covered.logits[:, 0], torch.inf)  # of each sample to its medoid [n]
    medoids = []
    for _ in range(k):
        drawn = torch.randperm(len(left), generator=rng)[:sample].to(left.device)
        candidates = left[drawn].sort().values  # of equal candidates the first one wins
        medoid = -1
        least = torch.inf
        for block in candidates.split(PRODUCT):
            rest = distances(block).minimum(nearest)  # [b, n]
            sums = rest.sum(dim=1)  # [b]
            best = int(sums.argmin())
            if sums[best] < least:
                medoid, least, after = int(block[best]), float(sums[best]), rest[best]
        medoids.append(medoid)
        nearest = after
        left = left[left != medoid]
    return left.new_tensor(medoids)


def cluster_shares(distances: Distances, medoids: Tensor) -> Tensor:
    """Count the covered samples nearest to each medoid, float64 [k] with sum n.

    A sample that is, up to rounding, as near to m medoids counts 1/m for each. Rounding is judged by squared distances
    ‖a‖² − 2<a, b> + ‖b‖², whose errors are of the size of their terms, not of the distance: a medoid counts as nearest
    if its square may be as low as the least one may be high. Takes 3·k·n(C + D) multiplications without cached rows.
    """
    view, covered = distances.view, distances.covered
    blocks = medoids.split(PRODUCT)
    limit = torch.full_like(covered.logits[:, 0], torch.inf)  # the highest value that the least square may have [n]
    for block in blocks:
        terms = view.norms()[block].square()[:, None] + covered.norms().square()  # the terms that round [b, n]
        highest = distances(block).square().add_(terms, alpha=2 * view.rounding)
        limit = limit.minimum(highest.amin(dim=0))
    ties = torch.zeros_like(limit, dtype=torch.float64)
    for block in blocks:
        nearest = distances(block).square() <= limit  # [b, n]
        ties += nearest.sum(dim=0)
    shares = []
    for block in blocks:
        nearest = distances(block).square() <= limit
        shares.append(nearest.double() @ (1 / ties))
    return torch.cat(shares)

"""Facility location: the k samples (medoids) whose gradients are closest to all gradients.

    S = argmin Σ_i min_{j∈S} ‖g_i − g_j‖,  |S| = k

i runs over the samples to cover, by default those that the medoids j are chosen from.

Greedy choice gains Σ_i max(0, min_{s∈S} ‖g_i − g_s‖ − ‖g_i − g_j‖) by one more medoid j. The gain of a sample never
grows as S grows (the objective is submodular), so an old gain bounds the present one from above. Logit gradients alone
are the gradients of a view without features, [n, 0].
"""

import torch
from torch import Tensor

from raypkg.core.errors import UserError

from .distances import PRODUCT, Distances
from .gradients import HeadView

TIED = 8  # gains this many units in the last place apart are equal: they are sums in an order that may change


def facility_location(distances: Distances, k: int) -> Tensor:
    """Choose medoids by lazy greedy: the largest gain each time.

    Two samples far from all others gain the same, whichever is taken: gains that are equal up to rounding go to the
    sample with the least Σ_i ‖g_i − g_j‖, and then by position.

    Takes n²(C + D)/2 multiplications if all n² distances are kept; if none are, four times as many, and 128·n(C + D)
    more for every few medoids. Peak memory is that of those kept and about ten blocks of 128·n numbers. With m other
    samples to cover, n·m and 128·m take the place of n²/2 and 128·n.

    Args:
        distances: of the n samples to choose from to those to be close to.
        k: 1 … n.

    Returns:
        The medoids in the order of their choice, int64 [k].

    Raises:
        UserError: k out of range.
    """
    _check(distances.view, k)
    totals = torch.cat([block.sum(dim=1) for block in distances.blocks()])  # Σ_i ‖g_i − g_j‖ of each j

    # without a medoid every sample is infinitely far from one, so the first is the one of least total distance
    first = int(totals.argmin())
    medoids = [first]
    nearest = distances(torch.tensor([first]))[0]  # of each sample to its medoid [n]

    candidates = _Candidates(distances, nearest, totals, first)
    while len(medoids) < k:
        medoid, row = candidates.take(nearest)
        medoids.append(medoid)
        nearest = nearest.minimum(row)
    return torch.tensor(medoids)


def stochastic_facility_location(distances: Distances, k: int, *, sample: int, rng: torch.Generator) -> Tensor:
    """Choose medoids by stochastic greedy: each time the best of ``sample`` random candidates (arXiv:1409.7938).

    Args:
        distances: of the n samples to choose from to those to be close to.
        k: 1 … n.
        sample: candidates a step, at least 1; ⌈n/k · ln(1/ε)⌉ are within 1 − 1/e − ε of the optimum in expectation.
        rng: draws the candidates.

    Returns:
        The medoids in the order of their choice, int64 [k].

    Raises:
        UserError: k or sample out of range.
    """
    _check(distances.view, k)
    if sample < 1:
        raise UserError(f"{sample} candidates a step: must be 1 or more")
    left = torch.arange(len(distances.view))
    nearest = torch.full_like(distances.covered.logits[:, 0], torch.inf)  # of each sample to its medoid [n]
    medoids = []
    for _ in range(k):
        drawn = torch.randperm(len(left), generator=rng)[:sample]
        candidates = left[drawn].sort().values  # of equal candidates the first one wins
        medoid, nearest = _smallest_sum(distances, nearest, candidates)
        medoids.append(medoid)
        left = left[left != medoid]
    return torch.tensor(medoids)


def cluster_shares(distances: Distances, medoids: Tensor) -> Tensor:
    """Count the covered samples nearest to each medoid.

    One that is, up to rounding, as near to m medoids counts 1/m for each.

    Rounding is judged by squared distances ‖a‖² − 2<a, b> + ‖b‖², whose errors are of the size of their terms, not of
    the distance: a medoid counts as nearest if its square may be as low as the least one may be high.

    Takes 3·k·n(C + D) multiplications if no distances are kept.

    Args:
        distances: what the medoids were chosen by, to n covered samples.
        medoids: int64 [k].

    Returns:
        The counts, float64 [k], with sum n.
    """
    blocks = medoids.split(PRODUCT)
    limit = torch.full_like(distances.covered.logits[:, 0], torch.inf)  # as high as the least square may be [n]
    for block in blocks:
        limit = limit.minimum(_highest_squares(distances, block).amin(dim=0))
    ties = torch.zeros_like(limit, dtype=torch.float64)
    for block in blocks:
        nearest = distances(block).square() <= limit  # [b, n]
        ties += nearest.sum(dim=0)
    shares = []
    for block in blocks:
        nearest = distances(block).square() <= limit
        shares.append(nearest.double() @ (1 / ties))
    return torch.cat(shares)


def _highest_squares(distances: Distances, medoids: Tensor) -> Tensor:
    """Return what the squared distances of medoids may be at most [b, n]."""
    view = distances.view
    terms = view.norms()[medoids].square()[:, None] + distances.covered.norms().square()  # what rounds [b, n]
    return distances(medoids).square().add_(terms, alpha=2 * view.rounding)


class _Candidates:
    """What each sample would gain as one more medoid: bounds for all, and the rows of those with the largest, in front.

    Only the gains in front are brought up to date at every step, all of them at once.
    """

    def __init__(self, distances: Distances, nearest: Tensor, totals: Tensor, first: int):
        numbers = torch.finfo(nearest.dtype)
        self._slack = 1 - TIED * numbers.eps  # an equal gain may have come out this much smaller
        self._least = numbers.tiny  # a bound below is 0, and the gain itself
        self._distances = distances
        self._totals = totals
        self._bounds = torch.cat([_gains(nearest, block) for block in distances.blocks()])
        self._taken = [first]
        self._renew()

    def take(self, nearest: Tensor) -> tuple[int, Tensor]:
        """Return the sample of the largest gain, and its row; it is no candidate any more."""
        gains, limit = self._up_to_date(nearest)
        tied = [i for i, gain in enumerate(gains) if gain >= limit]
        if len(tied) == 1 and self._beyond < limit:
            best = self._names[tied[0]]
            row = self._front[tied[0]]
        else:
            best = self._most_central(nearest, limit)
            row = self._distances(torch.tensor([best]))[0]
        self._taken.append(best)
        return best, row

    def _up_to_date(self, nearest: Tensor) -> tuple[list[float], float]:
        """Return the gains in front, and the gain from which on a sample ties with the largest one.

        Unless all in front tie, no other sample does.
        """
        while True:
            gains = _gains(nearest, self._front)
            values = gains.tolist()
            limit = max(max(values) * self._slack, self._least)
            if self._beyond < limit or min(values) >= limit:
                return values, limit
            self._bounds.scatter_(0, self._samples, gains)  # a medoid gains 0
            self._renew()

    def _renew(self) -> None:
        """Put those with the largest bounds in front."""
        count = min(self._distances.batch, len(self._bounds) - 1)
        bounds, samples = self._bounds.topk(count + 1)
        self._samples = samples[:count]
        self._names = self._samples.tolist()
        self._front = self._distances(self._samples)  # [b, n]
        self._beyond = float(bounds[count])  # the largest bound of all others

    def _most_central(self, nearest: Tensor, limit: float) -> int:
        """Return, of all samples that tie, the one with the least Σ_i ‖g_i − g_j‖."""
        self._bounds[self._taken] = -torch.inf
        open_ = (self._bounds >= limit).nonzero()[:, 0]
        for samples in open_.split(PRODUCT):
            self._bounds[samples] = _gains(nearest, self._distances(samples))
        largest = self._bounds.max()
        tied = self._bounds >= largest * self._slack  # all that are left, where none gains anything
        return int(self._totals.where(tied, torch.inf).argmin())


def _gains(nearest: Tensor, distances: Tensor) -> Tensor:
    """Return what each row of the distances [b, m] would take off Σ_i of the nearest ones, [b]."""
    return (nearest - distances).clamp_(min=0).sum(dim=1)


def _smallest_sum(distances: Distances, nearest: Tensor, candidates: Tensor) -> tuple[int, Tensor]:
    """Return the candidate that leaves the smallest Σ_i min_{s∈S} ‖g_i − g_s‖, and what it leaves of each i."""
    medoid = -1
    least = torch.inf
    left = nearest
    for block in candidates.split(PRODUCT):
        rest = distances(block).minimum(nearest)  # [b, n]
        sums = rest.sum(dim=1)  # [b]
        best = int(sums.argmin())
        if sums[best] < least:
            medoid = int(block[best])
            least = float(sums[best])
            left = rest[best]
    return medoid, left


def _check(view: HeadView, k: int) -> None:
    if not 1 <= k <= len(view):
        raise UserError(f"{k} medoids: must be from 1 to the number of samples, {len(view)}")

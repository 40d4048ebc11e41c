"""Means over seeds, and differences from a baseline seed by seed, with the interval that Student's t gives them."""

import math
from collections.abc import Iterable, Mapping
from statistics import fmean, stdev
from typing import NamedTuple

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: of the values.
        std: their standard deviation, with n − 1; NaN for one value.
        seeds: n.
    """

    mean: float
    std: float
    seeds: int


class Difference(NamedTuple):
    """A mean of differences from the baseline, seed by seed.

    Attributes:
        mean: of the differences.
        half: half the width of its 95 % interval, t · s / √n; NaN for one seed.
        seeds: that both have.
    """

    mean: float
    half: float
    seeds: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return abs(self.mean) > self.half


def estimated(values: Iterable[float]) -> Estimate | None:
    """Return mean and standard deviation; None of nothing.

    >>> estimated([1.0, 2.0, 3.0])
    Estimate(mean=2.0, std=1.0, seeds=3)
    """
    known = list(values)
    if not known:
        return None
    return Estimate(fmean(known), stdev(known) if len(known) > 1 else math.nan, len(known))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Return how far values are from the baseline's of the same seeds; None where no seed has both.

    >>> paired_difference({0: 2.0, 1: 4.0, 2: 9.0}, {0: 1.0, 1: 2.0}).mean
    1.5
    """
    both = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if not both:
        return None
    n = len(both)
    if n == 1:
        return Difference(both[0], math.nan, 1)
    from scipy.stats import t

    return Difference(fmean(both), float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(both) / math.sqrt(n), n)

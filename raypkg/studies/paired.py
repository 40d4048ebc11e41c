"""Means over seeds, and differences from a baseline seed by seed, with the interval that Student's t gives them."""

import math
from collections.abc import Iterable, Mapping
from functools import cache
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
    return Difference(fmean(both), t_quantile(n - 1) * stdev(both) / math.sqrt(n), n)


@cache
def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return t with P(|T| ≤ t) = confidence, T of Student's distribution with so many degrees of freedom.

    >>> round(t_quantile(2), 3), round(t_quantile(9), 3)
    (4.303, 2.262)
    """
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < confidence:
        high *= 2
    for _ in range(200):  # of bisection: to the last bit
        middle = (low + high) / 2
        if t_probability(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return high


def t_probability(t: float, freedom: int) -> float:
    """Return P(|T| ≤ t), the closed form for integer degrees of freedom ν (Abramowitz & Stegun 26.7.3, 26.7.4).

    With θ = arctan(t / √ν) and c = cos θ, the series is 1 + c²/2 + 1·3/(2·4) c⁴ + … up to c^(ν − 2) for even ν, and
    c + 2/3 c³ + 2·4/(3·5) c⁵ + … up to c^(ν − 2) for odd ν.
    """
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    series = 0.0
    for power in range(odd, freedom - 1, 2):
        series += term
        term *= cosine**2 * (power + 1) / (power + 2)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * series)
    return math.sin(angle) * series

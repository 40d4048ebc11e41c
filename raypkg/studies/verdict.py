"""Verdicts: whether a row of a table pays, against the baseline at equal total work.

Work counts everything that a run computed, selection included: (forward + 2 · backward) / 3 samples, evaluation apart.
Rows that are the baseline with more or less training give, for each seed, the baseline's metric as a function of work,
linear in log(work) between them. A row pays if its paired differences from it are positive beyond doubt.
"""

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import NamedTuple

import numpy as np

from .figures import half_interval
from .tables import NOT_PAID, PAID, UNKNOWN

EQUAL = 0.02  # relative difference of equal work
Point = tuple[float, float]  # work and metric of a run


class Verdict(NamedTuple):
    """A verdict with its reason."""

    word: str
    # Mean of the paired differences at equal work, and half of its interval; NaN if unknown.
    mean: float = math.nan
    half: float = math.nan
    seeds: int = 0


def judge(row: Mapping[int, Point], baseline: Mapping[int, Iterable[Point]], *, mode: str, verdicts: int) -> Verdict:
    """Return the verdict on a row, from its runs and the baseline's by seed.

    A table of rows without an effect has a verdict other than unknown with a probability of at most 5 %: intervals are
    for all its ``verdicts`` together. A row with more work than any baseline can only fail, one with less can only pay.

    >>> rows = {seed: (200.0, 0.9 + 0.001 * seed) for seed in range(3)}
    >>> random = {seed: [(100.0, 0.7), (400.0, 0.8)] for seed in range(3)}
    >>> judge(rows, random, mode="max", verdicts=1).word
    'paid'
    """
    sign = 1 if mode == "max" else -1
    differences = []
    can_fail = can_pay = True
    for seed, (work, value) in row.items():
        curve = sorted(baseline.get(seed, ()))
        if not curve:
            continue
        works, values = zip(*curve, strict=True)
        can_pay &= work <= works[-1] * (1 + EQUAL)
        can_fail &= work >= works[0] * (1 - EQUAL)
        expected = float(np.interp(math.log(work), np.log(works), values))
        differences.append(sign * (value - expected))
    count = len(differences)
    if count < 2:
        return Verdict(UNKNOWN, seeds=count)
    mean = fmean(differences)
    half = half_interval(differences, verdicts)
    word = UNKNOWN
    if mean > half and can_pay:
        word = PAID
    elif mean < -half and can_fail:
        word = NOT_PAID
    return Verdict(word, sign * mean, half, count)

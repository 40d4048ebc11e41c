"""Verdicts on simulated tables: false ones are rare, planted effects are found."""

import math

import numpy as np
import pytest

from raypkg.studies.outcomes import NOT_PAID, PAID, UNKNOWN, judge

WORKS = (100.0, 200.0, 300.0, 500.0)  # of the baseline rows


def accuracy(work: float, rng: np.random.Generator) -> float:
    """Return the baseline's accuracy at some work, saturating, with noise between runs."""
    return 0.9 - 0.3 * math.exp(-work / 200) + rng.normal(0, 0.01)


def table(rng: np.random.Generator, *, rows: int, seeds: int, gain: float = 0.0) -> list[str]:
    """Return the verdicts on a simulated table whose last row gains."""
    baseline = {seed: [(work, accuracy(work, rng)) for work in WORKS] for seed in range(seeds)}
    verdicts = []
    for row in range(rows):
        extra = gain if row == rows - 1 else 0.0
        work = float(rng.uniform(100, 500))
        runs = {seed: (work, accuracy(work, rng) + extra) for seed in range(seeds)}
        verdicts.append(judge(runs, baseline, mode="max", verdicts=rows).word)
    return verdicts


@pytest.mark.parametrize(("rows", "seeds"), [(1, 3), (8, 3), (8, 10)])
def test_rows_without_an_effect_pay_in_at_most_a_twentieth_of_the_tables(rows, seeds):
    rng = np.random.default_rng(0)
    false = sum(PAID in table(rng, rows=rows, seeds=seeds) for _ in range(200))
    assert false <= 10


def test_a_planted_effect_is_found():
    rng = np.random.default_rng(1)
    found = [table(rng, rows=8, seeds=5, gain=0.1)[-1] for _ in range(50)]
    assert found.count(PAID) >= 45


def test_a_row_at_a_baselines_work_is_compared_with_that_baseline():
    baseline = {seed: [(100.0, 0.5), (300.0, 0.8 + seed / 1000)] for seed in range(3)}
    verdict = judge({seed: (300.0, 0.7) for seed in range(3)}, baseline, mode="max", verdicts=1)
    assert (verdict.word, round(verdict.mean, 3)) == (NOT_PAID, -0.101)


@pytest.mark.parametrize(
    ("work", "value", "word"),
    [(1000.0, 0.9, UNKNOWN), (1000.0, 0.1, NOT_PAID), (10.0, 0.9, PAID), (10.0, 0.1, UNKNOWN)],
)
def test_beyond_the_baselines_work_only_one_verdict_is_possible(work, value, word):
    baseline = {seed: [(100.0, 0.5 + seed / 1000), (300.0, 0.6)] for seed in range(4)}
    assert judge({seed: (work, value) for seed in range(4)}, baseline, mode="max", verdicts=1).word == word


def test_lower_is_better_for_a_loss_and_one_seed_says_nothing():
    baseline = {seed: [(100.0, 2.0 + seed / 100)] for seed in range(3)}
    assert judge({seed: (100.0, 1.0) for seed in range(3)}, baseline, mode="min", verdicts=1).word == PAID
    assert judge({0: (100.0, 1.0)}, baseline, mode="min", verdicts=1).word == UNKNOWN

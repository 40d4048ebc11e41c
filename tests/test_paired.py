"""Means, differences and Student's t against printed tables, a density integrated by brute force, and hand sums."""

import math

import numpy as np
import pytest

from raypkg.studies.paired import Difference, estimated, paired_difference, t_probability, t_quantile

PRINTED = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 9: 2.262, 10: 2.228, 29: 2.045, 100: 1.984}


def by_integration(t, freedom):
    """P(|T| ≤ t): the density, integrated by Simpson's rule."""
    x = np.linspace(0, t, 20_001)
    log_factor = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = np.exp(log_factor) * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    weights = np.ones_like(x)
    weights[1:-1:2] = 4
    weights[2:-1:2] = 2
    return 2 * float((weights * density).sum() * (x[1] - x[0]) / 3)


@pytest.mark.parametrize(("freedom", "expected"), PRINTED.items())
def test_quantiles_are_those_of_printed_tables(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 30, 31])
@pytest.mark.parametrize("t", [0.3, 1.0, 2.5, 6.0])
def test_the_closed_form_is_the_integral_of_the_density(freedom, t):
    assert t_probability(t, freedom) == pytest.approx(by_integration(t, freedom), abs=1e-9)


def test_one_and_two_degrees_of_freedom_have_elementary_forms():
    assert t_probability(1.0, 1) == pytest.approx(0.5)  # Cauchy's quartiles are ±1
    assert t_probability(1.0, 2) == pytest.approx(1 / math.sqrt(3))


def test_many_degrees_of_freedom_are_the_normal_distribution():
    assert t_quantile(100_000) == pytest.approx(1.95996, abs=1e-4)


def test_a_difference_is_taken_seed_by_seed():
    values = {0: 91.0, 1: 94.0, 2: 90.0, 7: 50.0}  # the last has no partner
    baseline = {0: 90.0, 1: 92.0, 2: 87.0, 3: 10.0}
    found = paired_difference(values, baseline)
    assert found.mean == pytest.approx(2.0)
    assert found.half == pytest.approx(4.302653 * 1.0 / math.sqrt(3), rel=1e-5)  # differences 1, 2, 3: s = 1
    assert found.seeds == 3


def test_an_interval_that_leaves_out_zero_is_clear():
    assert Difference(2.0, 1.9, 3).is_clear and Difference(-2.0, 1.9, 3).is_clear
    assert not Difference(2.0, 2.1, 3).is_clear
    assert not Difference(2.0, math.nan, 1).is_clear


def test_of_one_seed_there_is_no_interval_and_of_none_no_difference():
    assert paired_difference({0: 2.0}, {0: 1.0}).mean == 1.0
    assert math.isnan(paired_difference({0: 2.0}, {0: 1.0}).half)
    assert math.isnan(estimated([3.0]).std)
    assert paired_difference({0: 2.0}, {1: 1.0}) is None
    assert estimated([]) is None

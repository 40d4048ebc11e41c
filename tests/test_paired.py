"""Means over seeds and paired differences with Student's interval, against hand sums."""

import math

import pytest

from raypkg.studies.paired import Difference, estimated, paired_difference


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

"""Samples a second and the time that is left: whatever starting takes, however many work, and after a restart."""

import pytest

from raypkg.runs.pace import Pace


def row(epoch, model=None, samples=100):
    return {"epoch": epoch, "model": model, "backward": samples * epoch}


def taken(pace, *rows):
    """Let a pace take rows, each given as (time, row) or (time, row, whether it is new)."""
    for now, each, *known in rows:
        pace.take(each, known != [False], now)
    return pace


def test_before_the_first_row_nothing_is_known():
    pace = Pace(10, now=5.0)
    assert (pace.rate, pace.left) == (None, None)


def test_the_first_row_is_measured_from_the_beginning():
    pace = taken(Pace(4, now=5.0), (15.0, row(1)))
    assert (pace.rate, pace.left) == (10.0, 30.0)


def test_from_the_second_row_on_what_starting_took_does_not_count():
    pace = taken(Pace(5, now=0.0), (62.0, row(1)), (64.0, row(2)))
    assert (pace.rate, pace.left) == (50.0, 6.0)


def test_all_of_training_counts_not_the_last_epoch_alone():
    pace = taken(Pace(4, now=0.0), (10.0, row(1)), (20.0, row(2)), (40.0, row(3)))
    assert pace.rate == 300 / 40


def test_models_one_after_the_other():
    rows = [(100.0 + 2 * number, row(1 + number % 5, number // 5)) for number in range(15)]
    pace = taken(Pace(50, now=0.0), *rows)
    assert pace.rate == pytest.approx(50.0)
    assert pace.left == pytest.approx(35 * 2.0)


@pytest.mark.parametrize("workers", [2, 4])
def test_models_on_several_workers_at_once(workers):
    """Worker r trains models r, r + W, …; each takes 10 s for an epoch, and all report within a fraction of one."""
    pace = Pace(8 * 5, now=0.0)
    for epoch in range(1, 6):
        for model in range(workers):
            pace.take(row(epoch, model), True, now=30.0 + 10 * epoch + 0.01 * model)
    assert pace.rate == pytest.approx(workers * 10, rel=0.01)
    assert pace.left == pytest.approx((8 - workers) * 5 * 10 / workers, rel=0.01)


def test_rows_that_are_known_from_before_a_restart_take_no_time():
    known = [(20.0, row(epoch), False) for epoch in range(1, 31)]
    pace = taken(Pace(40, now=0.0), *known)
    assert (pace.rate, pace.left) == (None, None)
    taken(pace, (22.0, row(31)))
    assert (pace.rate, pace.left) == (50.0, 18.0)


def test_a_restart_on_the_way_neither_counts_as_time_nor_its_rows_as_work():
    pace = taken(Pace(10, now=0.0), (2.0, row(1)), (4.0, row(2)))
    taken(pace, (64.0, row(1), False), (64.0, row(2), False))
    assert (pace.rate, pace.left) == (50.0, 16.0)  # what is known still holds
    taken(pace, (66.0, row(3)))
    assert (pace.rate, pace.left) == (50.0, 14.0)


def test_a_row_that_comes_twice_is_waited_for_once():
    pace = taken(Pace(4, now=0.0), (10.0, row(1)), (20.0, row(2)), (20.0, row(2), False), (30.0, row(3)))
    assert pace.left == 10.0


def test_after_the_last_row_nothing_is_left():
    assert taken(Pace(1, now=0.0), (10.0, row(1)), (20.0, row(2))).left == 0


def test_rows_at_one_moment_and_without_samples_divide_by_nothing():
    pace = taken(Pace(4, now=0.0), (0.0, {"epoch": 1}))
    assert (pace.rate, pace.left) == (None, None)
    assert taken(pace, (2.0, {"epoch": 2})).rate == 0

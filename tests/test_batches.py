"""Batches that are loaded ahead: how many wait, and that neither their number nor threads change what they hold."""

import time

import pytest
import torch

from raypkg.engine import batches
from raypkg.engine.batches import ahead

PATIENCE = 20  # seconds
JOBS = 20


@pytest.mark.parametrize(("size", "most"), [(1, 8), (99, 8), (250, 4), (251, 3), (700, 1), (5000, 1)])
def test_what_waits_is_bounded_in_number_and_bytes(monkeypatch, size, most):
    monkeypatch.setattr(batches, "AHEAD_BYTES", 1000)
    loaded = []

    def load(job):
        loaded.append(job)
        return torch.zeros(size - 1, dtype=torch.uint8), (torch.zeros(1, dtype=torch.uint8), job)

    for number, _ in enumerate(ahead(load, range(JOBS))):
        expected = min(JOBS, number + 1 + most) if number else 2  # how large one is shows when there is one
        until = time.monotonic() + PATIENCE
        while len(loaded) < expected and time.monotonic() < until:
            time.sleep(0.0005)
        time.sleep(0.001)  # in which more could be loaded
        assert loaded == list(range(expected))


def test_results_of_any_size_come_in_order(monkeypatch):
    monkeypatch.setattr(batches, "AHEAD_BYTES", 1000)
    sizes = [10] * 10 + [900] * 10 + [10] * 10
    found = ahead(lambda size: torch.zeros(size, dtype=torch.uint8), sizes)
    assert [len(value) for value in found] == sizes


def test_an_error_of_a_thread_reaches_the_loop():
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda job: 1 // job, [1, 0]))


def test_what_nobody_asks_for_is_not_loaded():
    loaded = []

    def load(job):
        time.sleep(0.02)
        loaded.append(job)

    coming = ahead(load, range(100))
    next(coming)
    next(coming)
    coming.close()
    assert len(loaded) <= 2 + 1 + batches.MOST_AHEAD // 2  # most of those that wait are given up

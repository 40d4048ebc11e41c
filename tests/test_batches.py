"""Batches that are loaded ahead: how many wait, and that neither their number nor threads change what they hold."""

import time

import pytest
import torch

import samples
from raypkg.data import load_data
from raypkg.data.coreset import Coreset
from raypkg.data.store import images
from raypkg.engine import batches
from raypkg.engine.batches import Batches, ahead
from raypkg.engine.worker import Worker, threads

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


@pytest.fixture
def encoded_images(tmp_path, monkeypatch):
    """Images that are decoded on read."""
    monkeypatch.setattr(images, "DECODED_BYTES", 0)
    encoded = [samples.encode(image, "JPEG") for image in samples.pixels(40, 24, 24)]
    for split in ("train", "test"):
        samples.write_parquet(tmp_path / "set" / f"{split}.parquet", encoded, torch.arange(40) % 3)
    return load_data(f"parquet:{tmp_path / 'set'}", {"size": 16}, cache=tmp_path / "cache").train


@pytest.mark.parametrize("count", [1, 2, 4])
def test_threads_and_workers_change_nothing(encoded_images, count):
    coreset = Coreset.uniform(torch.arange(0, 40, 2))

    def epoch(worker):
        arguments = {"seed": 3, "augment": ["crop", "flip"], "worker": worker}
        return list(Batches(encoded_images, coreset, 6, **arguments).epoch(1))

    with threads(1):
        expected = epoch(Worker())
    with threads(count):
        whole = epoch(Worker())
        first, second = epoch(Worker(0, 2)), epoch(Worker(1, 2))
    for ours, theirs in zip(whole, expected, strict=True):
        assert torch.equal(ours.x, theirs.x) and torch.equal(ours.indices, theirs.indices)
    for one, other, theirs in zip(first, second, expected, strict=True):
        assert torch.equal(torch.cat([one.x, other.x]), theirs.x)

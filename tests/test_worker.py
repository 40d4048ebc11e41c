"""Collectives: of a worker alone the identity, of two real processes what their names say."""

import torch

from gloo import collectives, on_workers
from raypkg.engine.worker import Worker


def test_two_workers_reach_each_other():
    first, second = on_workers(2, collectives)
    assert first == second  # everyone gets the same
    assert first["sum"] == [2.0, 1.0]
    assert first["gather"] == [{"rank": 0}, {"rank": 1}]
    assert first["share"] == [0.0, 0.0]  # those of rank 0
    assert first["gradient"] == 1.5  # the mean of 1 and 2


def test_a_worker_alone_is_its_own_group():
    worker, tensor = Worker(), torch.ones(3)
    assert worker.sum(tensor) is tensor and worker.gather("a") == ["a"]
    model = torch.nn.Linear(1, 1)
    assert worker.distribute(model) is model

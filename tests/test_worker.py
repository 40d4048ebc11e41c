"""Collectives: of a worker alone the identity, of two real processes what their names say."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gloo import collectives, on_workers
from raypkg.engine.worker import Worker


def test_two_workers_reach_each_other():
    first, second = on_workers(2, collectives)
    assert first == second  # everyone gets the same
    assert first["sum"] == [2.0, 1.0]
    assert first["gather"] == [{"rank": 0}, {"rank": 1}]
    assert first["first"] == {"rank": 0}
    assert first["share"] == [0.0, 0.0]  # those of rank 0
    assert first["gradient"] == 1.5  # the mean of 1 and 2


def test_a_worker_alone_is_its_own_group():
    worker, tensor = Worker(), torch.ones(3)
    assert worker.sum(tensor) is tensor and worker.gather("a") == ["a"]
    model = torch.nn.Linear(1, 1)
    assert worker.distribute(model) is model


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory as they see fit")
def test_memory_that_a_batch_frees_stays_for_the_next_until_the_peak_is_forgotten():
    script = Path(__file__).parent / "freed_memory.py"
    # of itself the library raises its threshold for blocks that it returns, to what depends on where the first ones lie
    settled = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    printed = subprocess.run([sys.executable, script], check=True, capture_output=True, env=settled).stdout
    kept = json.loads(printed)  # of 128 MiB
    assert kept["of itself"] < 16
    assert kept["after a batch"] > 112
    assert kept["forgotten"] < 16

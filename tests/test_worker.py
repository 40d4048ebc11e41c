"""Collectives: of a worker alone the identity, of two real processes what their names say."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from gloo import on_workers
from raypkg.data.split import Split
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.engine.worker import LARGEST_MMAP_THRESHOLD, Buffers, Worker


def collectives(worker):
    """Return what each collective gives this worker."""
    rank = float(worker.rank)
    shared = torch.full((2,), rank)
    worker.share([shared])
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    distributed = worker.distribute(model)  # which must outlive the backward pass
    (distributed(torch.ones(1, 1)) * (rank + 1)).sum().backward()
    return {
        "sum": worker.sum(torch.tensor([1.0, rank])).tolist(),
        "gather": worker.gather({"rank": worker.rank}),
        "interleaved": worker.interleaved(range(worker.rank, 5, worker.world)),
        "first": worker.first({"rank": worker.rank}),
        "share": shared.tolist(),
        "gradient": model.weight.grad.item(),
    }


def test_two_workers_reach_each_other():
    first, second = on_workers(2, collectives)
    gathered = {"gather": [{"rank": 0}, {"rank": 1}], "interleaved": [0, 1, 2, 3, 4], "first": {"rank": 0}}
    assert first == second == {"sum": [2.0, 1.0], **gathered, "share": [0.0, 0.0], "gradient": 1.5}


def test_a_worker_alone_is_its_own_group():
    worker, tensor = Worker(), torch.ones(3)
    assert worker.sum(tensor) is tensor and worker.gather("a") == ["a"]
    model = torch.nn.Linear(1, 1)
    assert worker.distribute(model) is model


PROGRAM = """# Prints by how many MiB this process has grown when it has freed 128 MiB, at several moments.
import json
from pathlib import Path
import torch
from raypkg.engine.batches import ahead
from raypkg.engine.worker import forget_peak_memory

def grown(start=0):
    blocks = [torch.ones(2**24, dtype=torch.uint8) for _ in range(8)]
    del blocks
    return resident() - start

def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024

start = grown()
kept = {"of itself": grown(start)}
list(ahead(abs, [0]))
kept["after a batch"] = grown(start)
forget_peak_memory()
print(json.dumps({**kept, "forgotten": resident() - start}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory as they see fit")
def test_memory_that_a_batch_frees_stays_for_the_next_until_the_peak_is_forgotten():
    # of itself the library raises its threshold for blocks that it returns, to what depends on where the first ones lie
    settled = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    printed = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, env=settled).stdout
    kept = json.loads(printed)  # of 128 MiB
    assert kept["of itself"] < 16
    assert kept["after a batch"] > 112
    assert kept["forgotten"] < 16


def test_a_large_batch_takes_the_memory_of_one_that_nothing_refers_to():
    buffers, large = Buffers(), (LARGEST_MMAP_THRESHOLD // 8 + 1,)

    def place(kept):
        kept.append(buffers.empty(large, dtype=torch.float64, device=torch.device("cpu"))[1:])
        return kept[-1].data_ptr()

    first, second = [], []
    of_first, of_second = place(first), place(second)
    assert of_first != of_second
    first.clear()
    assert place(first) == of_first
    second[0] = second[0].view(-1, 1)[3:]  # a view of a view still holds it
    first.clear()
    assert place(first) == of_first and place(first) not in (of_first, of_second)


def test_a_training_in_reused_memory_is_the_same(monkeypatch):
    split = Split.from_tensors(torch.arange(120.0).view(40, 3).sin(), torch.arange(40) % 2)
    ends = []
    for threshold in (LARGEST_MMAP_THRESHOLD, 0):
        monkeypatch.setattr("raypkg.engine.worker.LARGEST_MMAP_THRESHOLD", threshold)
        model = torch.nn.Linear(3, 2)
        torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
        run = fit(Run.simple(model, split, epochs=3, batch_size=4, precision="float64"))
        ends.append(model.weight)
        assert bool(run._buffers._free) == (not threshold)
    assert torch.equal(*ends)

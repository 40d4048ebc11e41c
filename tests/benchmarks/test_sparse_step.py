"""What sparse training and its correction add to an epoch: resnet20 on images of CIFAR-10's size, in turn.

pytest -m bench -s tests/benchmarks/test_sparse_step.py
"""

import statistics
import time
from dataclasses import replace

import pytest
import torch

from raypkg.core.settings import Agent, Sparsity, Training
from raypkg.data.split import Split
from raypkg.engine.correction import Correction
from raypkg.engine.costs import Cost
from raypkg.engine.hooks import Masked
from raypkg.engine.loop import Run, fit
from raypkg.engine.topology import Topology
from raypkg.engine.worker import Worker
from raypkg.methods.coreset import Coreset
from raypkg.models import build_model

N, ROUNDS = 2560, 5  # samples of an epoch of 20 steps; a tenth is two batches
TRAINING = Training(epochs=1, batch_size=128, schedule="constant", lr=0.01)


def correction(**settings):
    """A correction that corrects from the first step on."""
    hook = Correction(Agent(alpha=0.0, **settings))
    hook.c = 1.0
    return hook


def sparse():
    topology = Topology(Sparsity(density=0.1, growth="gradient", update_every=10), N // 128)
    return [topology, Masked(topology.masks)]


CASES = {
    "dense": list,
    "sparse, masks change every 10 steps": sparse,
    "dense, AGENT": lambda: [correction()],
    "AGENT, full gradient over a tenth": lambda: [correction(samples=N // 10)],
    "AGENT, and every 4th step corrected": lambda: [correction(samples=N // 10, every=4)],
}


@pytest.mark.bench
def test_epochs_in_turn():
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(256, (N, 3, 32, 32), generator=rng, dtype=torch.uint8)
    split = Split.from_tensors(x, torch.arange(N) % 10)
    seconds = {name: [] for name in CASES}
    for _ in range(ROUNDS + 1):
        for name, hooks in CASES.items():
            model = build_model("resnet20", (3, 32, 32), 10, seed=0, options={})
            everyone, worker = Coreset.uniform(torch.arange(N)), replace(Worker())
            run = Run(model, split, everyone, TRAINING, 0, "train", worker, ("crop", "flip"), Cost("train"), hooks())
            start = time.perf_counter()
            fit(run)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms up
    print(f"\n| resnet20, {N // 128} steps of 128, one thread | seconds | dense epochs |\n|---|---|---|")
    for name, median in medians.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[name][1:], seconds["dense"][1:], strict=True))
        print(f"| {name} | {median:.2f} | {ratio:.2f} |")

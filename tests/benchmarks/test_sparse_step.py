"""What sparse training and its correction add to an epoch: resnet20 on images of CIFAR-10's size.

Each runs between two dense epochs, by whose mean its seconds are divided, so that a noisy machine disturbs all alike.

pytest -m bench -s tests/benchmarks/test_sparse_step.py
"""

import statistics
import time

import pytest
import torch

from raypkg.core.settings import Training
from raypkg.data.split import Split
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.engine.worker import threads
from raypkg.methods.agent.hook import Correction
from raypkg.methods.agent.settings import AgentOptions
from raypkg.methods.sparse.hook import Enforced, Topology
from raypkg.methods.sparse.settings import Sparsity
from raypkg.models import build_model

N, ROUNDS = 1280, 9  # samples of an epoch of 10 steps; a tenth is one batch
TRAINING = Training(epochs=1, batch_size=128, schedule="constant", lr=0.01)


def correction():
    """A correction that corrects from the first step on."""
    return Correction(AgentOptions(form="measured", always=True))


class Twice(Correction):
    """Keeps no gradients, as where they do not fit into memory."""

    def _keeps(self, run):
        return False


def sparse():
    topology = Topology(Sparsity(density=0.1, growth="gradient", update_every_steps=5), N // 128)
    return [topology, Enforced(topology)]


CASES = {
    "sparse, masks change every 5 steps": sparse,
    "dense, AGENT": lambda: [correction()],
    "AGENT, the snapshot's gradients computed twice": lambda: [Twice(AgentOptions(form="measured", always=True))],
}


@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_epochs_between_dense_ones():
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(256, (N, 3, 32, 32), generator=rng, dtype=torch.uint8)
    split = Split.from_tensors(x, torch.arange(N) % 10)
    ratios = {name: [] for name in CASES}
    with threads(1):
        for _ in range(ROUNDS + 1):
            before = seconds(split, [])
            for name, hooks in CASES.items():
                taken, after = seconds(split, hooks()), seconds(split, [])
                ratios[name].append(2 * taken / (before + after))
                before = after
    print(f"\n| resnet20, {N // 128} steps of 128, one thread, medians of {ROUNDS} | dense epochs |\n|---|---|")
    for name, values in ratios.items():
        print(f"| {name} | {statistics.median(values[1:]):.2f} |")  # the first warms up


def seconds(split, hooks):
    """Return those of one epoch."""
    model = build_model("resnet20", (3, 32, 32), 10, seed=0, options={})
    run = Run.simple(model, split, TRAINING, hooks=hooks, augment=("crop", "flip"))
    start = time.perf_counter()
    fit(run)
    return time.perf_counter() - start

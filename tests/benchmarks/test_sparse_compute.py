"""Training seconds of an epoch, masked against truly sparse linear layers, in turn. pytest -m bench -s this file."""

import statistics
import time

import pytest
import torch

from raypkg.core.settings import Sparsity, Training
from raypkg.data.split import Split
from raypkg.engine.active import Active
from raypkg.engine.costs import Cost
from raypkg.engine.hooks import Masked
from raypkg.engine.loop import Run, fit
from raypkg.engine.topology import Topology
from raypkg.engine.worker import Worker
from raypkg.methods.coreset import Coreset
from raypkg.models import build_model

N, ROUNDS = 12_800, 3  # 100 steps of 128
MODELS = {"MLP 784-300-100": (784, (300, 100)), "MLP 3072-1024-1024-1024": (3072, (1024, 1024, 1024))}


def epoch(columns, hidden, density, compute, precision):
    """Return the seconds of one epoch of RigL with two changes of the masks, and the training loss."""
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(N) % 10
    split = Split.from_tensors(torch.randn(N, columns, generator=rng) + y[:, None] / 20, y)
    model = build_model("mlp", (columns,), 10, seed=0, options={"hidden": hidden})
    topology = Topology(Sparsity(density=density, growth="gradient", update_every=40), N // 128)
    training = Training(epochs=1, batch_size=128, schedule="constant", lr=0.02, precision=precision)
    hooks = [topology, Active(topology) if compute == "sparse" else Masked(topology.masks)]
    worker, rows = Worker(report=lambda row: rows.append(row)), []
    run = Run(model, split, Coreset.uniform(torch.arange(N)), training, 0, "train", worker, (), Cost("train"), hooks)
    start = time.perf_counter()
    fit(run)
    return time.perf_counter() - start, rows[0]["loss"]


@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_masked_against_sparse():
    torch.set_num_threads(1)
    print(f"\n{N // 128} steps of 128, RigL, one thread, medians of {ROUNDS}, in turn\n")
    columns = ("", "sparsity", "masked, float32", "masked, bfloat16", "sparse, float32", "ratios", "losses")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    ways = [("masked", "float32"), ("masked", "bfloat16"), ("sparse", "float32")]
    for name, (columns, hidden) in MODELS.items():
        for density in (0.1, 0.05, 0.01):
            rounds = [[epoch(columns, hidden, density, *way) for way in ways] for _ in range(ROUNDS + 1)][1:]
            seconds = [statistics.median(row[i][0] for row in rounds) for i in range(3)]
            ratios = [statistics.median(row[i][0] / row[2][0] for row in rounds) for i in range(2)]
            losses = " ".join(f"{rounds[0][i][1]:.3f}" for i in range(3))
            cells = [f"{s:.2f} s" for s in seconds] + [f"{ratios[0]:.1f}, {ratios[1]:.1f}", losses]
            print(f"| {name} | {1 - density:.0%} | " + " | ".join(cells) + " |", flush=True)

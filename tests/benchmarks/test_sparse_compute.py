"""Training seconds and accuracy of an epoch, masked against truly sparse linear layers, in turn, on real images.

EFFRAY_DATA=path/to/data pytest -m bench -s tests/benchmarks/test_sparse_compute.py
"""

import os
import statistics
import time
from pathlib import Path

import pytest
import torch

from raypkg.core.settings import Training
from raypkg.data import load_data
from raypkg.engine.loop import evaluate, fit
from raypkg.engine.run import Run
from raypkg.engine.worker import Cost, Worker, threads
from raypkg.methods.sparse.hook import Active, Enforced, Topology
from raypkg.methods.sparse.settings import Sparsity
from raypkg.models import build_model

DATA = Path(os.environ.get("EFFRAY_DATA", Path(__file__).parents[3] / "shared/data"))
MODELS = [("mnist", (300, 100)), ("cifar10", (300, 100)), ("cifar10", (1024, 1024, 1024))]
WAYS = [("masked", "float32"), ("masked", "bfloat16"), ("sparse", "float32")]
ROUNDS = 3
COLUMNS = ("", "sparse %", *(f"{way}, {precision}: seconds" for way, precision in WAYS), "ratios", "test accuracy %")


def epoch(data, hidden, density, compute, precision):
    """Return the seconds of one epoch of RigL, its masks changing every 100 steps, and the accuracy after it."""
    n = len(data.train)
    model = build_model("mlp", data.train.shape, 10, seed=0, options={"hidden": hidden})
    settings = Sparsity(density=density, growth="gradient", fan_in="sparse", update_every_steps=100)
    topology = Topology(settings, n // 128)
    training = Training(epochs=1, batch_size=128, schedule="cosine", lr=0.05, precision=precision)
    last = Active(topology) if compute == "sparse" else Enforced(topology)
    run = Run.simple(model, data.train, training, hooks=[topology, last], augment=())
    start = time.perf_counter()
    fit(run)
    seconds = time.perf_counter() - start
    test = torch.arange(len(data.test))
    measured = evaluate(run.model, data.test, test, Worker(), Cost("evaluate"), precision="float32")
    return seconds, 100 * measured["accuracy"]


@pytest.mark.bench
@pytest.mark.data
@pytest.mark.timeout(3600)
def test_masked_against_sparse():
    print(f"\nan epoch in batches of 128, RigL, one thread, medians of {ROUNDS}, in turn\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name, hidden in MODELS:
        data = load_data(f"parquet:{DATA}/{name}")
        for density in (0.1, 0.05, 0.01):
            with threads(1):
                rounds = [[epoch(data, hidden, density, *way) for way in WAYS] for _ in range(ROUNDS)]
            seconds = [statistics.median(row[i][0] for row in rounds) for i in range(3)]
            ratios = [statistics.median(row[i][0] / row[2][0] for row in rounds) for i in range(2)]
            cells = [*(f"{s:.2f}" for s in seconds), " and ".join(f"{ratio:.1f}" for ratio in ratios)]
            cells.append(", ".join(f"{accuracy:.1f}" for _, accuracy in rounds[0]))
            shape = "-".join(str(width) for width in hidden)
            print(f"| {name}, {shape} | {100 * (1 - density):g} | " + " | ".join(cells) + " |", flush=True)

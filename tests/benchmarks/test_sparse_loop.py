"""effray's loop of sparse layers against the same kernels in a loop written by hand, in turn: an MLP, 99 % sparse.

In milliseconds of the processor per step, on one thread; the masks stay. By hand, all samples are normalised before.
Run with: pytest -m bench -s tests/benchmarks/test_sparse_loop.py
"""

import time
from statistics import median

import pytest
import torch
import torch.nn.functional as F

from raypkg.core.settings import Training
from raypkg.data.split import Split
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.engine.worker import threads
from raypkg.methods.sparse.compute import ActiveLinear, Pattern, _Product
from raypkg.methods.sparse.hook import Active, Topology
from raypkg.methods.sparse.settings import Sparsity
from raypkg.models import build_model

SHAPE, HIDDEN, DENSITY, BATCH, STEPS, TURNS = (3, 32, 32), (1024, 1024, 1024), 0.01, 128, 120, 9


def effrays(x, y):
    model = build_model("mlp", SHAPE, 10, seed=0, options={"hidden": HIDDEN})
    topology = Topology(Sparsity(density=DENSITY, growth=None, fan_in="sparse"), STEPS * (TURNS + 1))
    settings = Training(epochs=TURNS + 1, batch_size=BATCH, lr=0.01, schedule="constant", precision="float32")
    hooks = [topology, Active(topology)]
    return Run.simple(model, Split.from_tensors(x, y), settings, hooks=hooks, augment=())


def by_hand(run):
    """Return active weights, patterns and biases of a run's layers, and an optimiser of the same settings."""
    layers = [layer for layer in run.model.modules() if isinstance(layer, ActiveLinear)]
    patterns: list[Pattern] = [layer.pattern for layer in layers]
    values = [layer.pattern.active(layer.weight.detach()).requires_grad_() for layer in layers]
    biases = [layer.bias.detach().clone().requires_grad_() for layer in layers]
    group = {name: run.optimizer.defaults[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
    return values, patterns, biases, torch.optim.SGD([*values, *biases], fused=True, **group)


def epoch(x, y, values, patterns, biases, optimizer):
    for rows, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        h = rows
        for number, layer in enumerate(zip(values, patterns, biases, strict=True)):
            weight, pattern, bias = layer
            h = _Product.apply(h.relu() if number else h, weight, pattern, False) + bias
        F.cross_entropy(h, labels).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.bench
@pytest.mark.timeout(1200)
def test_steps_in_turn():
    x, y = torch.randint(256, (BATCH * STEPS, *SHAPE), dtype=torch.uint8), torch.arange(BATCH * STEPS) % 10
    run, seconds = effrays(x, y), {"ours": [], "by hand": []}
    normal = (x.flatten(1).float() / 255 - 0.5) / 0.29
    with threads(1):
        for turn in range(TURNS + 1):
            begun, run.last = time.process_time(), turn + 1
            fit(run)
            seconds["ours"].append(time.process_time() - begun)
            if not turn:
                layers = by_hand(run)
            begun = time.process_time()
            epoch(normal, y, *layers)
            seconds["by hand"].append(time.process_time() - begun)
    ours, hand = (1e3 * median(each[1:]) / STEPS for each in seconds.values())  # the first turn warms up
    print(f"\n{ours:.2f} ms a step in effray's loop, {hand:.2f} by hand: {ours / hand:.2f}")

"""Steps of sparse training, in turn with others, so that a noisy machine disturbs all alike; on one thread.

    pytest -m bench -s tests/benchmarks/test_sparse_steps.py

Epochs of resnet20 with masks and AGENT, over dense ones. Blocks of a bare loop with `SparseTraining`, over the same
loop without it. An MLP at 99 % sparsity in effray's loop, over the same kernels in a loop written by hand, in which all
samples are normalised before and the masks stay.
"""

import statistics
import time
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from raypkg import SparseTraining
from raypkg.core.settings import Training
from raypkg.data.split import Split
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.engine.worker import threads
from raypkg.methods.agent.hook import Correction
from raypkg.methods.agent.settings import AgentOptions
from raypkg.methods.sparse.compute import ActiveLinear, Pattern, _Product
from raypkg.methods.sparse.hook import Active, Enforced, Topology
from raypkg.methods.sparse.settings import Sparsity
from raypkg.models import build_model

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]
PIXELS = (3, 32, 32)


def pixels(n):
    x = torch.randint(256, (n, *PIXELS), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return x, torch.arange(n) % 10


# Epochs between dense ones

N, ROUNDS = 1280, 9  # samples of an epoch of 10 steps; a tenth is one batch


class Twice(Correction):
    """Keeps no gradients, as where they do not fit into memory."""

    def on_epoch(self, run):
        with patch("raypkg.methods.agent.hook.memory_bound", lambda memory: 0):
            super().on_epoch(run)


def sparse():
    topology = Topology(Sparsity(density=0.1, growth="gradient", update_every_steps=5), N // 128)
    return [topology, Enforced(topology)]


ALWAYS = AgentOptions(form="measured", always=True)  # corrects from the first step on
EPOCHS = {
    "sparse, masks change every 5 steps": sparse,
    "dense, AGENT": lambda: [Correction(ALWAYS)],
    "AGENT, the snapshot's gradients computed twice": lambda: [Twice(ALWAYS)],
}


def test_epochs_between_dense_ones():
    split = Split.from_tensors(*pixels(N))
    settings = Training(epochs=1, batch_size=128, schedule="constant", lr=0.01)

    def seconds(hooks):
        model = build_model("resnet20", PIXELS, 10, seed=0, options={})
        run = Run.simple(model, split, settings, hooks=hooks, augment=("crop", "flip"))
        start = time.perf_counter()
        fit(run)
        return time.perf_counter() - start

    ratios = {name: [] for name in EPOCHS}
    with threads(1):
        for _ in range(ROUNDS + 1):
            before = seconds([])
            for name, hooks in EPOCHS.items():
                taken, after = seconds(hooks()), seconds([])
                ratios[name].append(2 * taken / (before + after))
                before = after
    print(f"\n| resnet20, {N // 128} steps of 128, one thread, medians of {ROUNDS} | dense epochs |\n|---|---|")
    for name, values in ratios.items():
        print(f"| {name} | {statistics.median(values[1:]):.2f} |")  # the first warms up


# A loop of one's own, with SparseTraining and without

BLOCK, BLOCKS, EVERY = 10, 30, 150  # steps timed together; blocks of each loop; ΔT
LOOPS = {
    "resnet8, 32 × 32 pixels, batches of 32": ("resnet8", PIXELS, {}, 32),
    "MLP 784-1024-1024-10, batches of 128": ("mlp", (784,), {"hidden": [1024, 1024]}, 128),
    "MLP 784-300-100-10, batches of 128": ("mlp", (784,), {"hidden": [300, 100]}, 128),
}


def bare_loop(name, shape, options, size, sparse):
    """Return a function that trains for a block of steps and returns its seconds of the processor."""
    model = build_model(name, shape, 10, seed=0, options=options)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=True)
    x, y = torch.randn(size, *shape), torch.arange(size) % 10
    if sparse:
        SparseTraining(model, optimizer, 0.1, total_steps=BLOCK * BLOCKS, update_every=EVERY)

    def seconds():
        start = time.process_time()
        for _ in range(BLOCK):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - start

    return seconds


@pytest.mark.parametrize("case", LOOPS)
def test_steps_of_a_bare_loop(case):
    with threads(1):
        plain, masked = (bare_loop(*LOOPS[case], sparse) for sparse in (False, True))
        plain(), masked()  # warm up
        pairs = []
        for _ in range(BLOCKS // 2):  # each first once: the other's data are in the cache then
            pairs.append((plain(), masked()))
            after, before = masked(), plain()
            pairs.append((before, after))
    # Blocks that change the masks count too: the sum over blocks, and the median without them.
    whole = sum(after for _, after in pairs) / sum(before for before, _ in pairs)
    median = statistics.median(after / before for before, after in pairs)
    milliseconds = 1e3 * statistics.median(before for before, _ in pairs) / BLOCK
    print(f"\n| {case} | {milliseconds:.2f} ms a step | {median:.3f} | {whole:.3f} with changes every {EVERY} steps |")


# Sparse layers, in effray's loop and by hand

HIDDEN, BATCH, STEPS, TURNS = (1024, 1024, 1024), 128, 120, 9


def effrays(x, y):
    topology = Topology(Sparsity(density=0.01, growth=None, fan_in="sparse"), STEPS * (TURNS + 1))
    settings = Training(epochs=TURNS + 1, batch_size=BATCH, lr=0.01, schedule="constant", precision="float32")
    model = build_model("mlp", PIXELS, 10, seed=0, options={"hidden": HIDDEN})
    return Run.simple(model, Split.from_tensors(x, y), settings, hooks=[topology, Active(topology)], augment=())


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
        for number, (weight, pattern, bias) in enumerate(zip(values, patterns, biases, strict=True)):
            h = _Product.apply(h.relu() if number else h, weight, pattern, False) + bias
        F.cross_entropy(h, labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_steps_of_sparse_layers():
    x, y = pixels(BATCH * STEPS)
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
    ours, hand = (1e3 * statistics.median(each[1:]) / STEPS for each in seconds.values())  # the first turn warms up
    print(f"\n{ours:.2f} ms a step in effray's loop, {hand:.2f} by hand: {ours / hand:.2f}")

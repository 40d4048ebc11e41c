"""A loop over a CoresetLoader against the same loop over its DataLoader: epochs in turn, on one thread.

In seconds of the processor per step, the median of each side. Run with: pytest -m bench -s.
"""

import json
import sys
import time
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import measured
from raypkg.coresets.loader import CoresetLoader
from raypkg.models import build_model

pytestmark = pytest.mark.bench
N, KEPT, BATCH, TURNS = 4096, 2048, 128, 15


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["mlp"])  # a short step: longer ones hide more
def test_overhead(name):
    found = measured.in_fresh_process(__file__, name)
    print("\n{name}: {plain:.2f} ms a step, {ours:.2f} ms from a CoresetLoader: {overhead:+.1%}".format(**found))


def in_turn(name):
    """Time epochs of as many samples: the plain loop's are a random half of them as a Subset."""
    shape = (3, 32, 32)
    generator = torch.Generator().manual_seed(0)
    samples = TensorDataset(torch.randn(N, *shape, generator=generator), torch.arange(N) % 10)
    model = build_model(name, shape, 10, seed=0).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    chosen = CoresetLoader(DataLoader(samples, BATCH), model, "random", KEPT / N, epochs=2 * TURNS)
    plain = DataLoader(Subset(samples, torch.randperm(N)[:KEPT].tolist()), BATCH, shuffle=True)
    seconds = {"plain": [], "ours": []}
    for _ in range(TURNS):
        for side, loader in {"plain": plain, "ours": chosen}.items():
            begun = time.process_time()
            steps = epoch(loader, model, optimizer)
            seconds[side].append((time.process_time() - begun) / steps)
    plain_ms, ours_ms = (1000 * median(each[1:]) for each in seconds.values())  # the first selects
    return {"name": name, "plain": plain_ms, "ours": ours_ms, "overhead": ours_ms / plain_ms - 1}


def epoch(loader, model: nn.Module, optimizer):
    steps = 0
    for x, y, *w in loader:
        losses = F.cross_entropy(model(x), y, reduction="none")
        loss = (losses * w[0]).mean() if w else losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(in_turn(*sys.argv[1:])))

"""A small problem, and the hooks of sparse training on it."""

import torch
import torch.nn.functional as F

from raypkg.core.settings import Training
from raypkg.data.split import Split
from raypkg.engine.run import Run
from raypkg.methods.sparse.hook import Active, Enforced, Topology
from raypkg.methods.sparse.settings import Sparsity
from raypkg.models import build_model

N, D, C = 96, 12, 3
PLAIN = Training(epochs=5, batch_size=16, lr=0.1, precision="float32", schedule="constant", weight_decay=0)
STEPS = 30


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def split():
    y = torch.arange(N) % C
    return Split.from_tensors(torch.randn(N, D, generator=rng()) + 2 * F.one_hot(y, D), y)


def batch(size=32):
    data = split()
    x, y = data.batch(torch.arange(size))
    return (x - torch.tensor(data.mean)) / torch.tensor(data.std), y


def network():
    return build_model("mlp", (D,), C, seed=0, options={"hidden": [16, 8]})


def run(*hooks, settings=PLAIN, model=None, **changes):
    return Run.simple(model or network(), split(), settings.model_copy(update=changes), hooks=hooks)


def sparse(*after, correction=(), active=False, **settings):
    """Return the hooks of a sparse training in their order, the topology first."""
    topology = Topology(Sparsity(**{"density": 0.3, "update_every_steps": 4, **settings}), STEPS)
    enforcing = Active(topology) if active else Enforced(topology)
    return [topology, *correction, enforcing, *after]


def counts_over_time(topology):
    """Return the active weights per layer, at the start and after each change."""
    layers = len(topology.masks)
    counts = [row["active"] for row in topology.history]
    return [counts[i : i + layers] for i in range(0, len(counts), layers)]

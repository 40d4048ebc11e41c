"""How far the gradients of mini-batch coresets are from that of the data, with and without the batch's statistics.

    python tests/benchmarks/crest_gradients.py RUN --root runs

Prints ‖g − ∇L‖²/‖∇L‖² at the model of a run, for gradients g of 128 of 500 random samples and of all 500; ∇L is over
4,000 samples. Batch norm uses the statistics of the batch in training mode, and gathered ones in evaluation mode.
"""

import argparse
from collections import defaultdict
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypkg.core.config import load_settings
from raypkg.engine.batches import plain_batches
from raypkg.experiments.samples import new_model, open_samples
from raypkg.experiments.training import MODEL
from raypkg.methods.crest.selection import logit_gradients, minibatch_coreset
from raypkg.methods.crest.settings import CrestSettings
from raypkg.runs.catalog import find
from raypkg.runs.checkpoints import load_tensors

N, R, M, ROUNDS = 4000, 500, 128, 16


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--root", default="runs")
    arguments = parser.parse_args()
    run = find(arguments.root, "crest", arguments.run)
    settings = load_settings(CrestSettings, run.config)
    samples = open_samples(settings)
    model = new_model(settings, samples.data)
    model.load_state_dict(load_tensors(run.storage, MODEL))
    rng = torch.Generator().manual_seed(0)
    order = torch.randperm(len(samples.train_indices), generator=rng)
    indices = samples.train_indices[order[:N]]
    batches = list(plain_batches(samples.data.train, indices, torch.device("cpu"), R))
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    whole = {mode: gradient(model.train(mode), x, y, torch.ones(N)) for mode in (False, True)}
    errors = defaultdict(list)
    for _ in range(ROUNDS):
        subset = torch.randperm(N, generator=rng)[:R]
        with torch.no_grad():
            picked = minibatch_coreset(logit_gradients(model.eval()(x[subset]), y[subset]), M)
        chosen = {
            "random": (subset[:M], torch.ones(M)),
            "CREST": (subset[picked.indices], picked.weights),
            f"all {R}": (subset, torch.ones(R)),
        }
        for (mode, target), (name, (indices, weights)) in product(whole.items(), chosen.items()):
            off = gradient(model.train(mode), x[indices], y[indices], weights) - target
            errors[name, mode].append(float(off.square().sum() / target.square().sum()))
    print(f"{arguments.run}: means of {ROUNDS}\n\n| batch | gathered statistics | the batch's own |\n|---|---|---|")
    for name in chosen:
        gathered, own = (sum(errors[name, mode]) / ROUNDS for mode in (False, True))
        print(f"| {name} | {gathered:.2f} | {own:.2f} |")


def gradient(model: nn.Module, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Return ∇ mean(w · loss), computed in batches of R, [p]; the model's statistics stay as they are."""
    parameters = list(model.parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    total = torch.zeros(sum(p.numel() for p in parameters))
    for part in torch.arange(len(y)).split(R):
        loss = F.cross_entropy(model(x[part]), y[part], reduction="none") @ weights[part] / len(y)
        total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    model.load_state_dict(state)
    return total


if __name__ == "__main__":
    main()

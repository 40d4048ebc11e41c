"""What CREST's mini-batch coresets are chosen by: logits, as published, or the head's gradients; at equal total work.

    python tests/benchmarks/crest_by.py --data path/to/data --seeds 0 1 2 3 4
    python tests/benchmarks/crest_by.py --tasks minilm --minilm path/to/all-MiniLM-L6-v2

Every step draws a random subset of four batches of 32 and trains on 32 medoids of

    logits: p − e_y        head: (p − e_y) ⊗ [φ, 1]

weighted by their clusters. A sample forward is a third of one forward and backward, so a step costs 75 samples; the
baselines are random batches of 75 in as many steps, and of 32 in 75/32 times the steps. Rate, schedule and seed are
alike; accuracy and loss are those of samples that never train.
"""

import argparse
import json
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypkg.core.seeds import generator, seeded
from raypkg.coresets.gradients import head_view
from raypkg.data import load_data
from raypkg.data.split import Split
from raypkg.engine.worker import threads
from raypkg.methods.crest.selection import logit_gradients, minibatch_coreset
from raypkg.models import build_model

BATCH = 32
WORK = 75  # samples of a step that chooses among four batches: 32 + 128 / 3


class Task(NamedTuple):
    """What is trained, and how."""

    data: str
    model: str
    steps: int
    lr: float
    optimizer: str = "sgd"
    model_options: dict[str, str] = {}  # noqa: RUF012
    data_options: dict[str, int] = {}  # noqa: RUF012


TASKS = {
    "mlp": Task("parquet:mnist", "mlp", 300, 0.05),
    "lenet5": Task("parquet:cifar10", "lenet5", 700, 0.02),
    "resnet8": Task("parquet:cifar10", "resnet8", 300, 0.05, model_options={"norm": "group"}),
    "transformer": Task("text:text/trec", "transformer", 200, 1e-3, "adamw"),
    "minilm": Task("text:text/trec", "transformers:", 32, 5e-5, "adamw", data_options={"length": 24}),
}
WAYS = {"random 75": (WORK, 1.0), "random 32": (BATCH, WORK / BATCH), "logits": (BATCH, 1.0), "head": (BATCH, 1.0)}


def main() -> None:
    """Train every task in every way from every seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared/data")
    parser.add_argument("--minilm", help="folder of all-MiniLM-L6-v2, for the task minilm")
    parser.add_argument("--tasks", nargs="+", default=[name for name in TASKS if name != "minilm"], choices=[*TASKS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    chosen = parser.parse_args()
    print("| | " + " | ".join(f"{way}: accuracy %, loss" for way in WAYS) + " | head − logits | … − best random |")
    print("|---" * (len(WAYS) + 3) + "|")
    for name in chosen.tasks:
        results: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        with threads(1):
            for seed, way in product(chosen.seeds, WAYS):
                result = trained(TASKS[name], chosen, way, seed)
                results[way].append(result)
                print(json.dumps([name, seed, way, *result]), file=sys.stderr, flush=True)
        accuracies = {way: [accuracy for accuracy, _ in of_way] for way, of_way in results.items()}
        losses = {way: statistics.mean(loss for _, loss in of_way) for way, of_way in results.items()}
        best = max(("random 75", "random 32"), key=lambda way: statistics.mean(accuracies[way]))
        cells = [f"{spread(accuracies[way])}, {losses[way]:.3f}" for way in WAYS]
        for other in ("logits", best):
            cells.append(spread([a - b for a, b in zip(accuracies["head"], accuracies[other], strict=True)]))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def trained(task: Task, chosen: argparse.Namespace, way: str, seed: int) -> tuple[float, float]:
    """Train a task in one way from a seed; return accuracy in % and loss on held-out samples."""
    kind, folder = task.data.split(":")
    options = dict(task.data_options)
    name = task.model
    if name == "transformers:":
        name += chosen.minilm
        options["tokenizer"] = chosen.minilm
    data = load_data(f"{kind}:{chosen.data / folder}", options=options)
    model = build_model(name, data.train.shape, data.train.num_classes, seed=seed, options=task.model_options)
    if task.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), task.lr, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), task.lr, weight_decay=0.01)
    size, factor = WAYS[way]
    steps = round(task.steps * factor)
    warm_up = max(1, round(0.1 * steps))
    with seeded(seed, "dropout", 0):
        for step in range(steps):
            drops = (step >= 0.6 * steps) + (step >= 0.85 * steps)
            for group in optimizer.param_groups:
                group["lr"] = task.lr * min(1, (step + 1) / warm_up) * 0.1**drops
            indices, weights = batch_of(way, size, model, data.train, seed, step)
            x, y = loaded(data.train, indices)
            model.train()
            loss = (F.cross_entropy(model(x), y, reduction="none") * weights).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return measured(model, data.test)


def batch_of(way: str, size: int, model: nn.Module, train: Split, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Return the samples of a step and their weights."""
    if way.startswith("random"):
        per_pass = len(train) // size
        turn, place = divmod(step, per_pass)
        order = torch.randperm(len(train), generator=generator(seed, "order", turn))
        return order[place * size :][:size], torch.ones(size)
    subset = torch.randperm(len(train), generator=generator(seed, "subset", step))[: 4 * BATCH]
    view = head_view(model, [loaded(train, subset)])
    picked = minibatch_coreset(view if way == "head" else logit_gradients(view.logits, view.y), BATCH)
    return subset[picked.indices], picked.weights


def loaded(split: Split, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs of a model, and labels."""
    x, y = split.batch(indices)
    return split.inputs(x), y


@torch.inference_mode()
def measured(model: nn.Module, test: Split) -> tuple[float, float]:
    """Return accuracy in % and mean loss over a test split."""
    model.eval()
    hits = loss = 0.0
    for indices in torch.arange(len(test)).split(500):
        x, y = loaded(test, indices)
        logits = model(x)
        hits += float((logits.argmax(1) == y).sum())
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
    return 100 * hits / len(test), loss / len(test)


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()

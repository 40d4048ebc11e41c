"""CREST beside random batches on small models, seed by seed, by accuracy on held-out samples and by samples computed.

    python tests/benchmarks/crest_small.py mnist --data path/to/data --seeds 0 1 2 3 4
    python tests/benchmarks/crest_small.py cifar10 --rows "random" "CREST" "CREST, fresh checks"

MLP on MNIST: 300 steps of 32; LeNet-5 on CIFAR-10: 700 steps of 32; a tenth of the training samples is held out, and
accuracy is theirs. A row is settings of CREST, or batches of other samples and rates. Differences are to
the first row, from the same seed; "in all" counts a sample forward as a third of one forward and backward.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raypkg.core.seeds import generator
from raypkg.core.settings import Training
from raypkg.coresets.record import Recorder
from raypkg.coresets.sharded import LiveModel
from raypkg.data import Data, load_data
from raypkg.data.augment import compose
from raypkg.data.coreset import Coreset
from raypkg.data.partition import hold_out
from raypkg.engine.batches import Batch, Epoch, ahead, training_batch
from raypkg.engine.hooks import Hook
from raypkg.engine.loop import evaluate, fit
from raypkg.engine.run import Run
from raypkg.engine.shards import LocalShards, Shard
from raypkg.engine.worker import threads
from raypkg.methods.crest.hook import Crest
from raypkg.methods.crest.settings import CrestOptions
from raypkg.models import build_model

BATCH = 32
SUBSET = 320  # r


class Task(NamedTuple):
    """What is trained, and how."""

    model: str
    steps: int
    lr: float
    augment: tuple[str, ...]


TASKS = {"mnist": Task("mlp", 300, 0.05, ()), "cifar10": Task("lenet5", 700, 0.02, ("crop", "flip"))}


class Row(NamedTuple):
    """A line of the table."""

    crest: Mapping[str, Any] | None = None  # settings; None = random batches
    batch: int = BATCH  # samples a step
    rate: float = 1.0  # times the task's learning rate
    steps: float = 1.0  # times the task's


MODEL = {"tau": 0.05}  # with a local model, as in the paper
R4 = {"subset": 4 * BATCH}
PUBLISHED = {
    **MODEL, "checked_on": "fresh", "smoothing": "pool", "settle": 0.0, "exclude_after": 0, "keep_active": 0.0,
    "augmented": False, "model_batches": 1,
}  # fmt: skip
ROWS = {
    "random": Row(),
    "CREST": Row({}),
    "CREST, r 2m": Row({"subset": 2 * BATCH}),
    "CREST, r 4m": Row(R4),
    "CREST, unaugmented": Row({"augmented": False}),
    "CREST, no exclusion": Row({"exclude_below": 0.0}),
    "CREST, the paper's text": Row(PUBLISHED),
    **{f"CREST, tau {tau:g}": Row({"tau": tau}) for tau in (0.01, 0.05, 0.2)},
    "CREST, h 10": Row({**MODEL, "h": 10.0}),
    "random, twice the rate": Row(rate=2.0),
    "random, half the rate": Row(rate=0.5),
    "CREST, r 4m, twice the rate": Row(R4, rate=2.0),
    "CREST, r 4m, half the rate": Row(R4, rate=0.5),
    **{f"random {batch}": Row(batch=batch) for batch in (40, 53, 64, 75, 96, 128, 320)},  # 53, 75: work of r 2m, r 4m
    "random 75, twice the rate": Row(batch=75, rate=2.0),
    "random, 2.5 times the steps": Row(steps=2.5),
    "random, 4 times the steps": Row(steps=4.0),
}


class RandomBatches(Hook):
    """Trains on random batches of all samples, each once before any again."""

    priority = 0

    def __init__(self, indices: Tensor, size: int, steps: int):
        self.indices = indices
        self.size = size
        self.steps = steps

    def batches(self, run: Run) -> Epoch:
        """Return the batches of an epoch."""
        steps = range(run.step, run.step + self.steps)
        return Epoch(self.steps, ahead(lambda step: self._load(run, step), steps))

    def _load(self, run: Run, step: int) -> Batch:
        per_pass = len(self.indices) // self.size
        turn, place = divmod(step, per_pass)
        order = torch.randperm(len(self.indices), generator=generator(run.seed, "order", turn))
        picked = self.indices[order[place * self.size :][: self.size]]
        augment = compose(run.augment)
        draws = torch.rand(self.size, augment.draws, generator=generator(run.seed, "augment", step))
        return training_batch(run.split, Coreset.uniform(picked), augment, draws, run.worker)


def main() -> None:
    """Train every row from every seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared/data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=[*ROWS], metavar="ROW")
    chosen = parser.parse_args()
    task = TASKS[chosen.task]
    data = load_data(f"parquet:{chosen.data / chosen.task}")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in chosen.rows}
    with threads(1):
        for seed, name in product(chosen.seeds, chosen.rows):
            result = trained(task, data, ROWS[name], seed)
            results[name].append(result)
            print(seed, name, result, file=sys.stderr, flush=True)
    print(f"{task.model}, {chosen.task}, {task.steps} steps of {BATCH}, r {SUBSET}, seeds {chosen.seeds}\n")
    print("| | accuracy % | difference | pools | T1 | backward, samples a step | in all |\n" + "|---" * 7 + "|")
    base = [result["accuracy"] for result in results[chosen.rows[0]]]
    for name, of_row in results.items():
        accuracies = [result["accuracy"] for result in of_row]
        differences = [a - b for a, b in zip(accuracies, base, strict=True)]
        costs = [statistics.mean(r[key] for r in of_row) for key in ("pools", "interval", "backward", "all")]
        cells = [spread(accuracies), spread(differences), *(f"{cost:.4g}" for cost in costs)]
        print(f"| {name} | " + " | ".join(cells) + " |")


def trained(task: Task, data: Data, row: Row, seed: int) -> dict[str, float]:
    """Train a row from a seed; return its held-out accuracy in % and its costs."""
    kept, held_out = hold_out(data.train.y, 0.1, generator(seed, "hold out"), None)
    steps = round(task.steps * row.steps)
    halves = steps // 2
    if row.crest is None:
        hook: Hook = RandomBatches(kept, row.batch, halves)
    else:
        hook = made(data, kept, row)
        hook.steps = halves
    training = Training(
        epochs=2,
        batch_size=row.batch,
        lr=task.lr * row.rate,
        schedule="multistep",
        milestones=(0.6, 0.85),
        warmup=0.1,
        nesterov=False,
        precision="float32",
    )
    model = build_model(task.model, data.train.shape, data.train.num_classes, seed=seed)
    hooks = [Recorder(data.train.y), hook]
    run = fit(Run.simple(model, data.train, training, hooks=hooks, seed=seed, augment=task.augment))
    accuracy = evaluate(run.model, data.train, held_out, precision="float32")["accuracy"]
    bills = run.bills()
    backward = sum(bill.backward for bill in bills)
    forward = sum(bill.forward for bill in bills)
    return {
        "accuracy": 100 * accuracy,
        "pools": hook.algorithm.state.updates if isinstance(hook, Crest) else 0,
        "interval": hook.algorithm.state.region.interval if isinstance(hook, Crest) else 0,
        "backward": backward / task.steps,
        "all": (forward + 2 * backward) / 3 / task.steps,
    }


def made(data: Data, kept: Tensor, row: Row) -> Crest:
    """Return CREST as a hook over the samples."""
    settings = {**CrestOptions.former, "subset": SUBSET, **(row.crest or {})}
    settings["subset"] = settings["subset"] / len(kept)
    shards = LocalShards([Shard(data, kept, torch.empty(0, dtype=torch.int64))])
    return Crest(CrestOptions(**settings), shards, lambda model: LiveModel(model, "float32"), kept, row.batch)


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()

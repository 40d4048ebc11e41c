"""AGENT on a convex problem: passes over the samples until the objective is near its minimum.

    python tests/benchmarks/agent_convex.py --dataset parquet:path/to/mnist

Logistic regression with an L2 penalty λ on 6,000 images of 14 × 14 pixels, momentum 0. A pass is one gradient per
sample, for steps, corrections, full gradients and looks. The gap is (f − f*) / f*, after each epoch. The best learning
rate per row and column is chosen on the first seed from --rates; cosine also has its length chosen from --horizons.
"""

import argparse
import statistics
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypkg.core.settings import Training
from raypkg.data import load_data
from raypkg.data.split import Split
from raypkg.engine.hooks import Hook
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.methods.agent.hook import Correction
from raypkg.methods.agent.settings import AgentOptions
from raypkg.models import build_model

GAPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
ROWS = {  # schedule, and AGENT's options
    "SGD, constant": ("constant", None),
    "SGD, 1/t": ("1/t", None),
    "SGD, cosine, length known": ("cosine", None),
    "AGENT": ("constant", {}),
    "AGENT, always on": ("constant", {"always": True}),
    "SVRG": ("constant", {"always": True, "alpha": 0.0}),
    "AGENT, published": ("constant", {"form": "published"}),
    "AGENT, published, γ = 1": ("constant", {"form": "published", "gamma": 1.0}),
}
NEVER = float("inf")


class Reached(Exception):
    """The last gap was."""


class Watch(Hook):
    """Notes passes and gap after each epoch, and ends training when nothing is left to reach."""

    priority = 200

    def __init__(self, problem: "Problem", *, falls: bool):
        self.problem = problem
        self.falls = falls
        self.found = dict.fromkeys(GAPS, NEVER)

    def on_gradients(self, run: Run) -> None:
        """Let the rate of 1/t fall, which is no schedule of the product: halved after the first 5 passes."""
        if self.falls:
            for group in run.optimizer.param_groups:
                group["lr"] = run.settings.lr / (1 + run.epoch / 5)

    def on_epoch_end(self, run: Run) -> None:
        gradients = sum(bill.backward for bill in run.bills())
        gap = self.problem.gap(run.model)
        for level in GAPS:
            if gap <= level and self.found[level] == NEVER:
                self.found[level] = gradients / len(run.split)
        if gap <= GAPS[-1] or gap > 1e3:
            raise Reached


class Problem:
    """The objective in float64, and its minimum."""

    def __init__(self, split: Split, penalty: float):
        x, y = split.batch(torch.arange(len(split)))
        self.split = split
        self.penalty = penalty
        self.x = split.inputs(x, torch.float64).flatten(1)
        self.y = y
        self.least = self._minimum()

    def value(self, weight: Tensor, bias: Tensor) -> Tensor:
        loss = F.cross_entropy(F.linear(self.x, weight, bias), self.y)
        return loss + self.penalty / 2 * (weight.square().sum() + bias.square().sum())

    @torch.no_grad()
    def gap(self, model: nn.Module) -> float:
        weight, bias = (parameter.double() for parameter in model.parameters())
        return (self.value(weight, bias).item() - self.least) / self.least

    def _minimum(self) -> float:
        weight = torch.zeros(10, self.x.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(10, dtype=torch.float64, requires_grad=True)
        options = {"max_iter": 2000, "history_size": 50, "tolerance_grad": 1e-11, "tolerance_change": 0}
        solver = torch.optim.LBFGS([weight, bias], line_search_fn="strong_wolfe", **options)

        def objective() -> Tensor:
            solver.zero_grad()
            value = self.value(weight, bias)
            value.backward()
            return value

        solver.step(objective)
        return objective().item()


def main() -> None:
    """Print the table."""
    given = arguments()
    problem = Problem(small(given.dataset, given.samples), given.penalty)
    print(
        f"λ {given.penalty:g}, batches of {given.batch}, rates {given.rates}, seeds {given.seeds}: passes to a relative"
        f" gap, mean ± std (rate)\n\n| | " + " | ".join(f"{level:.0e}" for level in GAPS) + " |"
    )
    print("|---" * (len(GAPS) + 1) + "|")
    for name in given.rows or ROWS:
        print(f"| {name} | " + " | ".join(cells(problem, given, *ROWS[name])) + " |", flush=True)


def cells(problem: Problem, given: argparse.Namespace, schedule: str, options: dict | None) -> list[str]:
    """Return each column's passes at its best rate and length, over the seeds."""
    lengths = given.horizons if schedule == "cosine" else given.horizons[-1:]
    tried = list(product(given.rates, lengths))
    first = {choice: passes(problem, given, schedule, options, *choice, given.seeds[0]) for choice in tried}
    best = {level: min(tried, key=lambda choice: first[choice][level]) for level in GAPS}
    results = {}
    for choice in set(best.values()):
        others = [passes(problem, given, schedule, options, *choice, seed) for seed in given.seeds[1:]]
        results[choice] = [first[choice], *others]
    return [cell([found[level] for found in results[best[level]]], best[level][0]) for level in GAPS]


def passes(problem: Problem, given, schedule: str, options: dict | None, rate: float, epochs: int, seed: int) -> dict:
    """Return the passes to each gap of one training."""
    settings = Training(
        epochs=epochs,
        batch_size=given.batch,
        lr=rate,
        momentum=0,
        weight_decay=given.penalty,
        schedule="cosine" if schedule == "cosine" else "constant",
        precision="float32",
    )
    watch = Watch(problem, falls=schedule == "1/t")
    hooks = [watch] if options is None else [Correction(AgentOptions(**{"form": "measured", **options})), watch]
    model = build_model("linear", problem.split.shape, 10, seed=seed, options={})
    try:
        fit(Run.simple(model, problem.split, settings, hooks=hooks, seed=seed, augment=()))
    except Reached:
        pass
    return watch.found


def cell(values: list[float], rate: float) -> str:
    """Return mean ± standard deviation, and the learning rate."""
    reached = [value for value in values if value != NEVER]
    if len(reached) < len(values):
        return f"{len(reached)} of {len(values)}" if reached else "never"
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{spread} ({rate:g})"


def small(dataset: str, samples: int) -> Split:
    """Return the first images, of half the width and height."""
    train = load_data(dataset).train
    x, y = train.batch(torch.arange(samples))
    pooled = F.avg_pool2d(x.float(), 2).round().to(torch.uint8)
    return Split.from_tensors(pooled, y)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--penalty", type=float, default=0.01, help="λ")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--horizons", type=int, nargs="+", default=[15, 30, 60, 90])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""AGENT on networks: test accuracy, gradients computed, and the variance that is left.

    python tests/benchmarks/agent_nets.py --dataset parquet:path/to/mnist --model lenet5 --rate 0.03

Every form trains for the same epochs from each seed; "plain, longer" for the passes of the most expensive. The variance
left is the mean over corrected steps. Differences to plain training are paired by seed, with two standard errors.
"""

import argparse
import math
import statistics

import torch

from raypkg.core.settings import Training
from raypkg.data import load_data
from raypkg.data.coreset import Coreset
from raypkg.engine.loop import evaluate, fit
from raypkg.engine.run import Run
from raypkg.methods.agent.hook import Correction
from raypkg.methods.agent.settings import AgentOptions
from raypkg.models import build_model

ROWS = {  # epochs in terms of those asked for, and AGENT's options
    "plain": (1, None),
    "plain, longer": (2, None),
    "AGENT": (1, {}),
    "AGENT, always on": (1, {"always": True}),
    "AGENT, published": (1, {"form": "published"}),
    "α-SVRG": (1, {"form": "linear"}),
}
COLUMNS = ("test accuracy %", "difference", "training loss", "passes", "steps corrected %", "variance left")


def main() -> None:
    """Print the table."""
    given = arguments()
    data = load_data(given.dataset)
    print(
        f"{given.model}, {given.samples} samples, batches of {given.batch}, {given.epochs} epochs, cosine from"
        f" {given.rate:g}, momentum {given.momentum:g}, seeds {given.seeds}\n\n| | " + " | ".join(COLUMNS) + " |"
    )
    print("|---" * (len(COLUMNS) + 1) + "|")
    plain: list[float] = []
    for name in given.rows or ROWS:
        found = [trained(given, data, *ROWS[name], seed) for seed in given.seeds]
        accuracies, losses, passes, shares, left = (list(column) for column in zip(*found, strict=True))
        plain = plain or accuracies
        cells = [
            spread(accuracies),
            difference(accuracies, plain),
            spread(losses),
            f"{statistics.mean(passes):.3g}",
            f"{statistics.mean(shares):.0f}",
            "–" if None in left else f"{statistics.mean(left):.2f}",
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def trained(given: argparse.Namespace, data, times: int, options: dict | None, seed: int) -> tuple:
    """Return the columns of one training."""
    settings = Training(
        epochs=times * given.epochs,
        batch_size=given.batch,
        lr=given.rate,
        momentum=given.momentum,
        schedule="cosine",
        precision="float32",
    )
    model = build_model(given.model, data.train.shape, data.train.num_classes, seed=seed, options={})
    hooks = [] if options is None else [Correction(AgentOptions(**{"form": "measured", **options}))]
    coreset = Coreset.uniform(torch.arange(given.samples))
    run = Run.simple(model, data.train, settings, hooks=hooks, coreset=coreset, seed=seed)
    fit(run)
    steps = hooks[0].results(run).tables["correction"].to_pylist() if hooks else []
    corrected = [step["left"] for step in steps if step["corrected"]]
    measured = [left for left in corrected if not math.isnan(left)]
    gradients = sum(bill.backward for bill in run.bills())
    accuracy = evaluate(run.model, data.test, precision="float32")["accuracy"]
    return (
        100 * accuracy,
        run.rows[-1]["loss"],
        gradients / given.samples,
        100 * len(corrected) / run.step,
        statistics.mean(measured) if measured else None,
    )


def difference(values: list[float], plain: list[float]) -> str:
    """Return the mean paired difference, and twice its standard error."""
    differences = [a - b for a, b in zip(values, plain, strict=True)]
    if len(differences) < 2:
        return f"{differences[0]:+.2f}"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.mean(differences):+.2f} ± {2 * error:.2f}"


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{deviation}"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS)
    return parser.parse_args()


if __name__ == "__main__":
    main()

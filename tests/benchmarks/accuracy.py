"""Test accuracy of every selection method at equal numbers of samples back-propagated, as a table.

    python tests/benchmarks/accuracy.py --dataset parquet:path/to/cifar10

trains each method at each fraction from each seed, several runs at a time, one thread each; a run that is finished is
not run again. Methods that look at gradients select anew every ``--every-epochs`` by the model of that moment.
"""

import argparse
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from launched import finished

WEIGHTED = ("gradmatch", "gradmatchpb", "craig")  # methods whose weights are half of what they choose
METHODS = {
    "random": "--select.method random",
    "random-online": "--select.method random --select.every_epochs 1",
    **{
        name: f"--select.method {name} --select.every_epochs EVERY --select.weighted {str(name in WEIGHTED).lower()}"
        for name in (
            "el2n",
            "grand",
            "uncertainty",
            "moderate",
            "kcenter",
            "craig",
            "gradmatch",
            "gradmatchpb",
            "glister",
        )
    },
}
ALL_SAMPLES = {"infobatch": "--select.method infobatch --select.every_epochs 1", "all samples": ""}  # of no fraction


def main() -> None:
    """Run what is missing, then print the table."""
    given = arguments()
    chosen = {name: METHODS[name] for name in given.methods if name in METHODS}
    runs = [
        (name, fraction, seed, f"{options.replace('EVERY', str(given.every_epochs))} --select.fraction {fraction}")
        for seed in given.seeds
        for fraction in given.fractions
        for name, options in chosen.items()
    ] + [(name, 1.0, seed, ALL_SAMPLES[name]) for seed in given.seeds for name in given.methods if name in ALL_SAMPLES]
    with ThreadPoolExecutor(given.jobs) as pool:
        summaries = list(pool.map(lambda run: summary(given, *run), runs))
    results = {run[:3]: result for run, result in zip(runs, summaries, strict=True) if result}
    print(f"\n{given.model}, {given.epochs} epochs, {len(given.seeds)} seeds: test accuracy in %, mean ± std\n")
    header = ["method", *(f"{fraction:.0%}" for fraction in given.fractions)]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for name in chosen:
        print(f"| {name} | " + " | ".join(cell(results, name, f, given.seeds) for f in given.fractions) + " |")
    for name in ALL_SAMPLES:
        shares = [share_of_work(result) for (method, *_), result in results.items() if method == name]
        if shares:
            share = statistics.mean(shares)
            print(f"\n{name}: {cell(results, name, 1.0, given.seeds)} with {share:.0%} of the samples back-propagated")


def summary(given: argparse.Namespace, name: str, fraction: float, seed: int, options: str) -> dict | None:
    """Return the manifest of one run of the table."""
    fixed = f"--dataset {given.dataset} --model {given.model} --seed {seed} --train.epochs {given.epochs}"
    run = f"{name}-{fraction:g}-{seed}".replace(" ", "-")
    return finished(given.root, "train", run, f"{fixed} --train.evaluate_every_epochs 0 {options}")


def share_of_work(result: dict) -> float:
    """Return the samples back-propagated, over those of as many epochs on all samples."""
    return sum(phase["backward"] for phase in result["phases"]) / result["full_training_backward"]


def cell(results: dict, name: str, fraction: float, seeds: list[int]) -> str:
    """Return mean ± standard deviation over the seeds that there are."""
    values = [100 * results[key]["test_accuracy"] for seed in seeds if (key := (name, fraction, seed)) in results]
    if not values:
        return "–"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else float('nan'):.1f}"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--every-epochs", type=int, default=4, help="epochs between selections by gradients")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.01, 0.05, 0.1, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *ALL_SAMPLES], choices=[*METHODS, *ALL_SAMPLES])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--root", default=os.environ.get("EFFRAY_RUNS", "runs"))
    return parser.parse_args()


if __name__ == "__main__":
    main()

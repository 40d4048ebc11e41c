"""CREST and its baselines at one budget against full training, as the paper's table has it.

    python tests/benchmarks/crest_accuracy.py --dataset parquet:path/to/cifar10
    python tests/benchmarks/crest_accuracy.py --dataset text:path/to/trec --model transformer --batch 32 \\
        --settings="--train.optimizer adamw --train.lr 1e-3 --train.weight_decay 0.01 --train.warmup 0.1"

trains each from each seed, several runs at a time, one thread each; a run that is finished is not run again. Relative
error is |accuracy − full accuracy| / full accuracy; speed-up is the full training's seconds over the run's, both on the
critical path and of the same seed. Give --jobs 1 on a machine whose cores disturb each other.
"""

import argparse
import os
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from launched import finished

CHEAP = "--crest.h 10 --crest.b 1 --crest.subset 0.00569"
ROWS = {
    "full training": "--selection random --budget 1",
    "SGD cut short": "--selection cut",
    "random batches": "--selection random",
    "crest, the paper's settings": "",
    "crest, h 4": "--crest.h 4",
    "crest, h 10, b 1, r 2 batches": CHEAP,
    "crest, the same, overlapped": f"{CHEAP} --crest.overlap true",
    "crest, first order": "--crest.order 1",
    "crest, no smoothing": "--crest.smoothing false",
    "crest, no exclusion": "--crest.exclude_below 0",
    "craig": "--selection craig",
    "gradmatch": "--selection gradmatch",
    "glister": "--selection glister",
}
COLUMNS = ("accuracy %", "relative error %", "speed-up", "steps", "pools", "backward %")


def main() -> None:
    """Run what is missing, then print the table."""
    chosen = arguments()
    jobs = [(name, seed) for seed in chosen.seeds for name in chosen.rows]
    with ThreadPoolExecutor(chosen.jobs) as pool:
        summaries = list(pool.map(lambda job: summary(chosen, *job), jobs))
    results = {job: result for job, result in zip(jobs, summaries, strict=True) if result}
    print(f"\n{chosen.model}, {chosen.budget:.0%} of {chosen.epochs} epochs, seeds {chosen.seeds}, mean ± std\n")
    print("| | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for name in chosen.rows:
        rows = [
            figures(results[name, seed], results.get(("full training", seed)), chosen.batch)
            for seed in chosen.seeds
            if (name, seed) in results
        ]
        print(f"| {name} | " + " | ".join(cell([row[i] for row in rows]) for i in range(len(COLUMNS))) + " |")


def summary(chosen: argparse.Namespace, name: str, seed: int) -> dict | None:
    """Return the manifest of one run of the table."""
    options = f"--dataset {chosen.dataset} --model {chosen.model} --seed {seed} --train.epochs {chosen.epochs}"
    options += f" --train.batch_size {chosen.batch} {chosen.settings}"
    budget = "" if "--budget" in ROWS[name] else f"--budget {chosen.budget}"
    share = chosen.budget if budget else "all"
    run = re.sub(r"\W+", "-", f"{name} {share} {seed}")
    return finished(chosen.root, "crest", run, f"{options} --train.evaluate_every_epochs 0 {budget} {ROWS[name]}")


def figures(result: dict, full: dict | None, batch: int) -> list[float | None]:
    """Return the columns of one run; ``full`` is full training from the same seed."""
    accuracy = result["test_accuracy"]
    backward = {phase["phase"]: phase["backward"] for phase in result["phases"]}
    steps = round(backward["train"] / batch)
    error = faster = None
    if full:
        error = 100 * abs(accuracy - full["test_accuracy"]) / full["test_accuracy"]
        faster = seconds(full) / seconds(result)
    return [
        100 * accuracy,
        error,
        faster,
        steps,
        result.get("pools"),
        100 * sum(backward.values()) / result["full_training_backward"],
    ]


def seconds(result: dict) -> float:
    """Return the seconds of training and selection on the critical path, without evaluation."""
    return sum(phase["seconds"] for phase in result["phases"] if "evaluate" not in phase["phase"])


def cell(values: list[float | None]) -> str:
    """Return mean ± standard deviation of the runs that there are."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.2g}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.4g}{spread}"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--epochs", type=int, default=20, help="of full training")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=128, help="samples a step")
    parser.add_argument("--settings", default="", help="of every run, as on the command line")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=[*ROWS])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--root", default=os.environ.get("EFFRAY_RUNS", "runs"))
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Sparse training and its gradient correction: accuracy after each quarter, gradients computed, and seconds.

    python tests/benchmarks/sparse_accuracy.py --dataset parquet:path/to/mnist --model mlp

trains each row at each density from each seed, several runs at a time, one thread each; a run that is finished is not
run again. Gradients are counted in passes over the training samples; seconds are those of training, without evaluation.
With ``--share 0.15`` all rows of a seed train on the same random samples, which leaves time for more epochs.
"""

import argparse
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from launched import finished
from raypkg.runs.folder import find

SPARSE = {
    "static": "--growth false",
    "SET": "--growth random",
    "RigL": "--growth gradient",
}
AGENT = "--agent true"
CHEAP = f"{AGENT} --agent.every_steps 4 --agent.samples {{tenth}}"
COLUMNS = ("density %", "1/4", "1/2", "3/4", "end", "test accuracy %", "gradients, epochs", "seconds", "R_s %")


def main() -> None:
    """Run what is missing, then print the table."""
    given = arguments()
    rows = rows_of(given.densities)
    jobs = [(*row, seed) for seed in given.seeds for row in rows]
    parts = {seed: part(given, seed) for seed in given.seeds}
    with ThreadPoolExecutor(given.jobs) as pool:
        results = dict(zip(jobs, pool.map(lambda job: figures(given, parts[job[-1]], *job), jobs), strict=True))
    print(f"\n{given.model}, {given.epochs} epochs, seeds {given.seeds}, mean ± std; quarters: held-out accuracy, %\n")
    print("| | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for row in rows:
        finished_runs = [results[(*row, seed)] for seed in given.seeds if results[(*row, seed)]]
        columns = zip(*finished_runs, strict=True) if finished_runs else [()] * (len(COLUMNS) - 1)
        density = "100" if row[1] is None else f"{100 * row[1]:g}"
        print(f"| {row[0]} | {density} | " + " | ".join(cell(values) for values in columns) + " |")


def rows_of(densities: list[float]) -> list[tuple[str, float | None, str]]:
    """Return the rows of the table: name, density and options."""
    plain: list[tuple[str, float | None, str]] = [("dense", None, "")]
    for density in densities:
        plain += [(name, density, options) for name, options in SPARSE.items()]
    rows = []
    for name, density, options in plain:
        rows.append((name, density, options))
        rows.append((f"{name} + AGENT", density, f"{options} {AGENT}"))
    return rows + [("SET + cheap AGENT", density, f"{SPARSE['SET']} {CHEAP}") for density in densities]


def part(given: argparse.Namespace, seed: int) -> str:
    """Return the option that keeps a seed's runs to some of the samples."""
    if given.share == 1:
        return ""
    draw = f"--select.method random --select.fraction {given.share} --model linear --train.epochs 1 --seed {seed}"
    finished(given.root, "train", f"part-{seed}", f"--dataset {given.dataset} {draw}")
    return f"--coreset {given.root}/train/part-{seed}/coreset.parquet"


def figures(
    given: argparse.Namespace, part: str, name: str, density: float | None, options: str, seed: int
) -> list | None:
    """Return the columns of one run."""
    run = f"{name}-{'dense' if density is None else density}-{seed}".replace(" ", "-").replace("+-", "")
    quarter = max(1, given.epochs // 4)
    shape = f"--train.epochs {given.epochs} --train.evaluate_every_epochs {quarter} --model {given.model} --seed {seed}"
    sparse = "" if density is None else f"--density {density} {given.sparse_options}"
    options = options.format(tenth=given.tenth)
    line = f"--dataset {given.dataset} {shape} {part} {sparse} {options} {given.options}"
    summary = finished(given.root, "sparse", run, line)
    if not summary:
        return None
    accuracies = [row["accuracy"] for row in find(given.root, "sparse", run).rows if row.get("accuracy") is not None]
    phases = [phase for phase in summary["phases"] if "evaluate" not in phase["phase"]]
    return [
        *(100 * accuracy for accuracy in (accuracies + [float("nan")] * 4)[:4]),
        100 * summary["test_accuracy"],
        sum(phase["backward"] for phase in phases) / (summary["coreset"] or summary["samples"]),
        sum(phase["seconds"] for phase in phases),
        100 * summary.get("explored", 1),
    ]


def cell(values: tuple[float, ...]) -> str:
    """Return mean ± standard deviation."""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}" if values else "–"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.01])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tenth", type=int, default=5400, help="samples of the cheap correction's full gradient")
    parser.add_argument("--share", type=float, default=1, help="of the training samples, drawn by seed")
    parser.add_argument("--options", default="", help="further options of every run")
    parser.add_argument("--sparse-options", default="", help="further options of the sparse ones")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--root", default=os.environ.get("EFFRAY_RUNS", "runs"))
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""How random a window of blocks is: training on streamed samples beside training on samples shuffled whole.

    python tests/benchmarks/streaming.py --folder path/to/empty/folder --data path/to/mnist

MNIST as it is published and sorted by class, the worst order there is, in blocks of 64 KiB instead of 8 MiB, so that
there are some 700 of them; test accuracy of an MLP after two epochs, mean and standard deviation over seeds.
"""

import argparse
import json
import statistics
from pathlib import Path

import pyarrow.parquet as pq

from raypkg.cli import main as effray
from raypkg.data.store import streamed

WINDOWS = (4, 16, 64, 256, 100_000)  # blocks; the last is all of them
RUN = "train --model mlp --train.epochs 2 --train.lr 0.02 --train.precision float32 --cluster.workers 0"


def main() -> None:
    """Train from every order, window and seed, and print a table."""
    chosen = arguments()
    streamed.BLOCK_BYTES = 64 << 10
    print("| blocks in the window | " + " | ".join(("as published", "sorted by class")) + " |")
    print("|---|---|---|")
    folders = [arranged(chosen, sort) for sort in (False, True)]
    for window in WINDOWS:
        cells = [cell(chosen, folder, window) for folder in folders]
        print(f"| {window} | " + " | ".join(cells) + " |", flush=True)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args()


def arranged(chosen: argparse.Namespace, sort: bool) -> Path:
    """Write the files of the data set in an order of their rows, once."""
    folder = chosen.folder / ("sorted" if sort else "published")
    for file in chosen.data.glob("*.parquet"):
        table = pq.read_table(file)
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.sort_by("label") if sort else table, folder / file.name)
    return folder


def cell(chosen: argparse.Namespace, folder: Path, window: int) -> str:
    """Train from every seed; return mean and deviation of the test accuracy, in percent."""
    accuracies = [accuracy(chosen.folder, folder, window, seed) for seed in chosen.seeds]
    return f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}"


def accuracy(root: Path, folder: Path, window: int, seed: int) -> float:
    """Train once; return the test accuracy in percent."""
    name = f"{folder.name}-{window}-{seed}"
    data = f"--dataset parquet:{folder} --dataset.streamed {root}/stores --dataset.window {window}"
    line = f"{RUN} {data} --seed {seed} --root {root}/runs --name {name}"
    try:
        effray(line.split())
    except SystemExit as ended:
        if ended.code:
            raise
    summary = json.loads((root / "runs/train" / name / "summary.json").read_text())
    return 100 * summary["test_accuracy"]


if __name__ == "__main__":
    main()

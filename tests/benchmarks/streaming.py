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
    """Train from every order, window and seed, and print a table: test accuracy in percent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    streamed.BLOCK_BYTES = 64 << 10
    print("| blocks in the window | as published | sorted by class |\n|---|---|---|")
    for sort in ("published", "sorted"):
        for file in chosen.data.glob("*.parquet"):
            table = pq.read_table(file)
            (chosen.folder / sort).mkdir(parents=True, exist_ok=True)
            pq.write_table(table.sort_by("label") if sort == "sorted" else table, chosen.folder / sort / file.name)
    for window in WINDOWS:
        cells = []
        for sort in ("published", "sorted"):
            found = [accuracy(chosen.folder, sort, window, seed) for seed in chosen.seeds]
            cells.append(f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}")
        print(f"| {window} | {' | '.join(cells)} |", flush=True)


def accuracy(root: Path, sort: str, window: int, seed: int) -> float:
    """Train once; return the test accuracy in percent."""
    name = f"{sort}-{window}-{seed}"
    data = f"--dataset parquet:{root / sort} --dataset.streamed {root}/stores --dataset.window {window}"
    try:
        effray(f"{RUN} {data} --seed {seed} --root {root}/runs --name {name}".split())
    except SystemExit as ended:
        if ended.code:
            raise
    return 100 * json.loads((root / "runs/train" / name / "summary.json").read_text())["test_accuracy"]


if __name__ == "__main__":
    main()

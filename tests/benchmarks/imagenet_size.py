"""As many images and classes as ImageNet has: imported, selected from and trained on, with seconds and peak memory.

    python tests/benchmarks/imagenet_size.py --folder path/to/empty/folder

makes 1,280,000 JPEG images of 64 × 64 pixels in 1,000 classes (about 3 GB, once), and runs `effray lipt` without
pre-training: selection by the gradients of a random head, and 200 steps of training on what was selected. With
`--streamed` the store is read by blocks, and the import is part of the first run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import encode_jpeg

SIDE = 64
IN_A_FILE = 10_000
IN_A_GROUP = 500
TEST = 10_000
QUALITY = 75
METHODS = ("grand", "gradmatch", "craig")


def main() -> None:
    """Make the images, import them, then run each method; print a table."""
    chosen = arguments()
    folder = chosen.folder / f"images-{chosen.images}"
    make(folder, chosen.images, chosen.classes)
    os.environ["EFFRAY_CACHE"] = str(chosen.folder / "cache")
    print("| | seconds | peak MiB |")
    print("|---|---|---|")
    if not chosen.streamed:
        seconds, peak = measured(["data", f"parquet:{folder}"])
        print(f"| import | {seconds:.0f} | {peak:.0f} |", flush=True)
    for method in chosen.methods:
        name = f"{method}-{chosen.images}{'-streamed' * chosen.streamed}"
        seconds, peak = measured(run_of(chosen, folder, method, name))
        summary = json.loads((chosen.folder / "runs/lipt" / name / "summary.json").read_text())
        phases = {phase["phase"]: phase["seconds"] for phase in summary["phases"]}
        shown = ", ".join(f"{phase} {took:.0f}" for phase, took in phases.items())
        print(f"| `{method}`: {shown} | {seconds:.0f} | {peak:.0f} |", flush=True)


def run_of(chosen: argparse.Namespace, folder: Path, method: str, name: str) -> list[str]:
    """Return the command of a run that trains for 200 steps, twice over a hundredth of the images."""
    picks = chosen.images // 100
    options = {
        "name": name,
        "root": chosen.folder / "runs",
        "dataset": f"parquet:{folder}",
        "dataset.validation": 0,
        "model": "mlp",
        "set": "model.options.hidden=[64]",
        "pretrain.method": "initial",
        "select.rule": method,
        "select.fraction": 0.01,
        "train.epochs": 2,
        "train.batch_size": max(2, picks // 100),
        "train.lr": 0.01,
        "train.evaluate_every_epochs": 2,
        "cluster.workers": 0,
    }
    if chosen.streamed:
        options["dataset.streamed"] = chosen.folder / "stores"
    return ["lipt", *(f"--{option}={value}" for option, value in options.items())]


def measured(words: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds, and the most MiB that it held, pages of the mapped store among them."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "raypkg", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"effray {' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def make(folder: Path, images: int, classes: int) -> None:
    """Write the images as parquet files, those that are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(0)
    patterns = torch.rand(classes, 3, 4, 4, generator=rng)
    noise = torch.randn(1000, 3, SIDE, SIDE, generator=rng).mul_(0.1)
    starts = range(0, images, IN_A_FILE)
    for number, start in enumerate(starts):
        write(folder / f"train-{number:05}.parquet", min(IN_A_FILE, images - start), number, patterns, noise)
    write(folder / "test-00000.parquet", min(TEST, images), len(starts), patterns, noise)


def write(file: Path, count: int, seed: int, patterns: Tensor, noise: Tensor) -> None:
    """Write one file of images: the pattern of a class, varied, with noise."""
    if file.exists():
        return
    rng = torch.Generator().manual_seed(seed + 1)
    labels = torch.arange(count) % len(patterns)
    encoded: list[bytes] = []
    for y in labels.split(IN_A_GROUP):
        varied = patterns[y] + 0.3 * torch.randn(len(y), *patterns.shape[1:], generator=rng)
        x = interpolate(varied, size=SIDE, mode="bilinear")
        x += noise[torch.randint(len(noise), (len(y),), generator=rng)]
        pixels = x.mul_(255).clamp_(0, 255).to(torch.uint8)
        encoded += [encode_jpeg(image, quality=QUALITY).numpy().tobytes() for image in pixels]
    table = pa.table({"image": pa.array(encoded, pa.binary()), "label": labels.numpy()})
    unfinished = file.with_suffix(".part")
    pq.write_table(table, unfinished, row_group_size=IN_A_GROUP, compression="none")
    unfinished.rename(file)


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1_280_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--streamed", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()

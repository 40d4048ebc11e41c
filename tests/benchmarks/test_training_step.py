"""The pace of training against a plain loop. Run with: pytest -m bench -s."""

import json
import os
import statistics
import subprocess
import sys

import pytest

import plain_loop

pytestmark = pytest.mark.bench
PROCESSES = 5


def plain_seconds():
    """Seconds of a plain PyTorch loop in a process of its own."""
    done = subprocess.run([sys.executable, plain_loop.__file__], check=True, capture_output=True)
    return json.loads(done.stdout)


def command_seconds(root):
    """Seconds in which the command trains as much, in a process of its own."""
    paths = [os.path.dirname(plain_loop.__file__), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = (
        f"train --root {root} --name timed --dataset plain_loop:load --dataset.validation 0 --hooks plain_loop:Timer"
        f" --model resnet20 --train.epochs 1 --train.batch_size {plain_loop.BATCH} --cluster.workers 0"
    )
    subprocess.run([sys.executable, "-m", "raypkg", *command.split()], env=environment, check=True, capture_output=True)
    summary = json.loads((root / "train" / "timed" / "summary.json").read_text())
    return summary["timed"]


@pytest.mark.timeout(600)
def test_command_against_a_plain_loop(tmp_path):
    pairs = [(plain_seconds(), command_seconds(tmp_path / str(number))) for number in range(PROCESSES)]
    images = plain_loop.IMAGES["train"]
    print(f"\nresnet20, batch {plain_loop.BATCH}, crop and flip, 1 thread, medians of {PROCESSES} runs each in turn")
    for kind in ("wall", "processor"):  # on a shared machine the second says more
        plain = statistics.median(images / theirs[kind] for theirs, ours in pairs)
        command = statistics.median(images / ours[kind] for theirs, ours in pairs)
        ratios = [theirs[kind] / ours[kind] for theirs, ours in pairs]
        print(f"  images per second of the {kind}")
        print(f"    {'plain PyTorch loop':<20}{plain:8.0f}")
        print(f"    {'effray train':<20}{command:8.0f}")
        print(f"    {'ratio':<20}{statistics.median(ratios):8.3f}   ({min(ratios):.3f} to {max(ratios):.3f})")

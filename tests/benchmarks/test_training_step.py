"""The pace of training: against a bare step, a plain loop, and of two workers. Run with: pytest -m bench -s."""

import json
import os
import statistics
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import plain_loop
from raypkg.core.settings import Cluster, Training
from raypkg.data.split import Split
from raypkg.engine.loop import autocast, fit
from raypkg.engine.optimizer import build_optimizer
from raypkg.engine.run import Run
from raypkg.engine.worker import Worker
from raypkg.models import build_model

pytestmark = pytest.mark.bench
SETTINGS = Training(epochs=1, batch_size=128, lr=0.01)
STEPS, ROUNDS = 24, 11
PROCESSES = 5


def pixels(n):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Split.from_tensors(x, torch.arange(n) % 10, augment=("crop", "flip"))


def looped(worker, split, rounds, batch_size=128):
    """Seconds per epoch of the product's loop, augmentation and all."""
    model = build_model("resnet20", (3, 32, 32), 10, seed=0)
    seconds = []
    for number in range(rounds):
        settings = SETTINGS.model_copy(update={"batch_size": batch_size})
        run = fit(Run.simple(model, split, settings, seed=number, worker=worker))
        seconds.append(run.cost.seconds)
    return seconds


class Bare:
    """The shortest loop that trains: one float batch already in memory, the same model, layout, dtype and optimiser."""

    def __init__(self):
        self.model = build_model("resnet20", (3, 32, 32), 10, seed=0).to(memory_format=torch.channels_last).train()
        self.optimizer = build_optimizer(self.model, SETTINGS)
        self.x = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
        self.y = torch.arange(128) % 10

    def epoch(self):
        start = time.perf_counter()
        for _ in range(STEPS):
            with autocast("auto", self.x.device):
                logits = self.model(self.x)
            F.cross_entropy(logits.float(), self.y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start


def test_step_against_a_bare_loop():
    split, bare = pixels(128 * STEPS), Bare()
    bare.epoch(), looped(Worker(), split, 1)
    pairs = [(bare.epoch(), looped(Worker(), split, 1)[0]) for _ in range(ROUNDS)]
    ratio = statistics.median(ours / theirs for theirs, ours in pairs)
    print(f"\nresnet20, batch 128, {torch.get_num_threads()} threads, medians of {ROUNDS} alternating rounds")
    for name, column in (("bare loop", 0), ("effray loop, crop and flip", 1)):
        print(f"  {name:<28}{128 * STEPS / statistics.median(pair[column] for pair in pairs):8.0f} images/s")
    print(f"  ratio of seconds per image  {ratio:8.3f}")


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


def in_turn(worker, rounds):
    """Rates in images/s, round by round: one worker alone, two that know nothing of each other, two with DDP."""
    alone, halves = pixels(128 * STEPS), pixels(64 * STEPS)
    rates = {"1 worker": [], "2 workers": [], "2 apart": []}
    for _ in range(rounds):
        worker.gather(None)
        if worker.rank == 0:
            rates["1 worker"].append(len(alone) / looped(Worker(), alone, 1)[0])
        worker.gather(None)
        rates["2 workers"].append(len(alone) / looped(worker, alone, 1)[0])
        apart = worker.gather(looped(Worker(), halves, 1, batch_size=64)[0])
        rates["2 apart"].append(len(halves) * sum(1 / seconds for seconds in apart))
    return rates


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_two_workers_against_one(tmp_path, monkeypatch):
    from raypkg.cluster.workers import Workers

    paths = [os.path.dirname(__file__), os.path.dirname(plain_loop.__file__)]  # what workers import
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    with Workers(Cluster(workers=2), lambda row: None, str(tmp_path)) as workers:
        rates = workers.run(in_turn, ROUNDS + 1)
    print(f"\nresnet20, batch 128, one thread a worker, medians of {ROUNDS} rounds taken in turn")
    for name, found in rates.items():
        ratio = statistics.median(b / a for a, b in zip(rates["1 worker"][1:], found[1:], strict=True))
        print(f"  {name:<10}{statistics.median(found[1:]):8.0f} images/s   ratio {ratio:5.2f}")

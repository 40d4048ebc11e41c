"""What a step of CREST costs beside a plain one, part by part, on CIFAR-10. Run with: pytest -m bench -s.

Runs take turns, an epoch each, so that a noisy machine disturbs all alike.
"""

import os
import statistics
from pathlib import Path

import pytest
import torch

from raypkg.core.settings import Dataset, Training
from raypkg.data import load_data
from raypkg.data.coreset import Coreset
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.engine.worker import threads
from raypkg.methods.crest.hook import Crest
from raypkg.methods.crest.settings import CrestOptions
from raypkg.models import build_model

pytestmark = [pytest.mark.bench, pytest.mark.data]
DATA = Path(os.environ.get("EFFRAY_DATA", Path(__file__).parents[3] / "shared/data"))
BATCH, STEPS, ROUNDS = 128, 40, 7
EACH_STEP = CrestOptions.former  # with the local model of `fast` where τ > 0
FAST = {**EACH_STEP, "tau": 0.05, "subset": 0.01}
SETTINGS = {
    "plain SGD": None,
    "each-step": EACH_STEP,
    "each-step, r 256": {**EACH_STEP, "subset": 256 / 50_000},
    "published": {"subset": 0.01},
    "fast, r 1 %": FAST,
    "… h 10, b 1": {**FAST, "h": 10, "b": 1},
    "… h 10, b 1, r 256": {**FAST, "h": 10, "b": 1, "subset": 256 / 50_000},
}
PARTS = ("train", "select", "model", "check")


@pytest.mark.timeout(3600)
def test_a_step_of_crest_against_a_plain_step():
    data = load_data(Dataset(name=f"parquet:{DATA}/cifar10").name)
    runs = {name: made(data, settings) for name, settings in SETTINGS.items()}
    rounds = {name: [] for name in SETTINGS}
    with threads(1):
        for number in range(ROUNDS):
            for name, run in runs.items():
                before = seconds(run)
                run.last = number + 1
                fit(run)
                rounds[name].append({part: value - before.get(part, 0.0) for part, value in seconds(run).items()})
    print(
        f"\nCIFAR-10, resnet20, batches of {BATCH}: {ROUNDS} rounds of {STEPS} steps in turn, medians after the first"
    )
    print("in plain steps of one thread\n")
    print(f"{'':<30}{'step':>7}" + "".join(f"{part:>8}" for part in PARTS) + f"{'pools':>7}{'T1':>4}")
    plain = [row["train"] for row in rounds["plain SGD"]]
    for name, rows in rounds.items():
        ratios = [{p: row.get(p, 0.0) / base for p in PARTS} for row, base in zip(rows, plain, strict=True)][1:]
        whole = statistics.median(sum(row.values()) for row in ratios)
        cells = "".join(f"{statistics.median(row[part] for row in ratios):>8.2f}" for part in PARTS)
        ends = "".join(
            f"{crest.algorithm.state.pool.update:>7}{crest.algorithm.state.region.interval:>4}"
            for crest in runs[name].hooks
        )
        print(f"{name:<30}{whole:>7.2f}{cells}{ends}")


def made(data, settings):
    """Prepare a run over all samples whose epochs are rounds of STEPS steps."""
    indices = torch.arange(len(data.train))
    hooks = []
    if settings is not None:
        crest = Crest(CrestOptions(**settings), indices, BATCH)
        crest.steps = STEPS
        hooks.append(crest)
    training = Training(epochs=ROUNDS, batch_size=BATCH, schedule="multistep", milestones=(0.6, 0.85), warmup=0.1)
    model = build_model("resnet20", data.train.shape, 10, seed=0)
    few = Coreset.uniform(indices[: STEPS * BATCH])  # of plain steps
    return Run.simple(model, data.train, training, hooks=hooks, coreset=few, augment=("crop", "flip"))


def seconds(run):
    return {bill.phase: bill.seconds for bill in run.bills()}

"""`--dry-run`: what is printed is what a run then does, and nothing is started, kept or left behind."""

import json
import re
import sys
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

SHORT = "--model mlp --train.epochs 4"


def plan(text):
    """Return the lines of a plan by the first word of each."""
    lines = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    return {line.split()[0].rstrip(":"): line for line in lines}


def numbers(line):
    return [int(word.replace(",", "")) for word in line.split()[1:]]


def backward(run):
    phases = json.loads(Path("runs", run, "summary.json").read_text())["phases"]
    return {phase["phase"]: phase["backward"] for phase in phases}


def absent(told, run):
    """Return the files of a plan that a run has not left."""
    planned = told["files"].removeprefix("files: ").partition(" and ")[0].split()
    return [file for file in planned if not (run / file).exists()]


@pytest.mark.parametrize(
    "command",
    [
        f"train {SHORT}",
        f"train {SHORT} --select.fraction 0.1 --select.warm_epochs 2",
        f"train {SHORT} --select.rule gradmatch --select.fraction 0.25 --select.every_epochs 2",
        "crest --model mlp --train.epochs 10 --budget 0.2 --train.batch_size 64",
        "crest --model mlp --train.epochs 10 --budget 0.2 --selection cut",
        "crest --model mlp --train.epochs 10 --budget 0.2 --selection craig",
        f"sparse {SHORT} --density 0.2 --multiplier 2",
        "sparse --model mlp --train.epochs 2 --crest",
        "deltagrad train --train.epochs 4",
    ],
)
def test_the_plan_is_what_the_run_then_does_and_leaves_nothing(effray, tmp_path, command):
    told = plan(effray(f"{command} --name one --dry-run"))
    assert list(tmp_path.iterdir()) == []
    models, epochs, *_, planned = numbers(told["train"].replace("/", " "))
    effray(f"{command} --name one")
    (run,) = Path("runs").glob("*/one")
    done = backward(f"{run.parent.name}/one")
    assert models == 1
    assert planned == done["train"]
    assert epochs == len(set(pq.read_table(run / "metrics.parquet")["epoch"].to_pylist()))
    assert absent(told, run) == []


@pytest.mark.parametrize(
    ("options", "row"),
    [
        ("--pretrain.sparsity false", "pretrain 3 2 64 431 42 2,586"),
        ("--pretrain.method dense", "pretrain 1 2 64 1,295 42 2,590"),
        ("--pretrain.method initial", "pretrain"),
    ],
)
def test_the_plan_of_lipt_has_its_pretraining(effray, options, row):
    command = f"lipt {SHORT} --name one --pretrain.models 3 --pretrain.epochs 2 --pretrain.batch_size 64"
    command += f" {options}"
    told = plan(effray(f"{command} --dry-run"))
    assert told["pretrain"].split() == row.split()
    assert told["select"] == "select" and told["selection"] == "selection: gradmatch, 130 of 1,295 samples"
    effray(command)
    assert absent(told, Path("runs/lipt/one")) == []
    assert backward("lipt/one")["pretrain"] == (numbers(told["pretrain"]) or [0])[-1]
    together = re.search(r"all phases: ([\d,]+), ([\d.]+)%", told["samples"])
    planned = (numbers(told["pretrain"]) or [0])[-1] + 4 * 130
    assert together[1] == f"{planned:,}" and float(together[2]) == pytest.approx(100 * planned / (4 * 1295), abs=0.05)


def test_other_selections_are_planned_too(effray):
    effray("train --name one --model linear --train.epochs 1 --select.fraction 0.1")
    for kind in ("train", "sparse"):  # on a coreset that is given
        told = plan(effray(f"{kind} {SHORT} --coreset runs/train/one/coreset.parquet --dry-run"))
        assert told["train"].split() == "train 1 4 128 130 8 520".split()
    told = plan(effray(f"train {SHORT} --select.rule infobatch --select.every_epochs 1 --dry-run"))
    assert "infobatch, of 1,295 samples as many as it sees fit: what follows is the most" in told["selection"]
    told = plan(effray("select --model-from one --rule craig --fraction 0.2 --name two --dry-run"))
    assert told["selection"] == "selection: craig, 259 of 1,295 samples"
    assert "coreset.parquet" in told["files"].split() and not Path("runs/select").exists()


def test_what_is_printed_is_a_file_of_settings_for_the_same_run(effray):
    text = effray(f"lipt {SHORT} --seed 3 --dry-run")
    Path("mine.toml").write_text(text)
    assert tomllib.loads(text)["train"]["epochs"] == 4
    assert effray("lipt --config mine.toml --dry-run") == text


def test_the_plan_tells_data_model_workers_and_place(effray, tmp_path):
    told = plan(effray("train --model linear --name one --dry-run"))
    assert told["data"] == (
        "data: 1,437 samples, of which 1,295 to train on and 142 held out, and 360 to test on; 10 classes, shape"
        " 1 × 8 × 8"
    )
    assert told["model"] == "model: linear, 650 parameters"
    assert told["memory"].startswith("memory of training: 40.6 kB = parameters 2.6 kB + gradients 2.6 kB + optimiser")
    assert told["workers"] == "workers: none, this process with 1 thread"
    assert told["folder"] == f"folder: {tmp_path}/runs/train/one"
    assert "model.safetensors" in told["files"]
    cluster = "--cluster.workers 3 --cluster.gpus_per_worker 2 --cluster.cpus_per_worker 4"
    told = plan(effray(f"crest {cluster} --dry-run"))
    assert told["workers"] == "workers: 3; 4 threads and 2 GPUs each"


@pytest.mark.parametrize(
    ("optimizer", "copies", "precision", "size"),
    [("--train.momentum 0", 0, "float32", 4), ("", 1, "float64", 8), ("--train.optimizer adamw", 2, "float32", 4)],
)
def test_the_memory_is_that_of_the_optimiser_and_the_precision(effray, optimizer, copies, precision, size):
    told = plan(effray(f"train --model linear {optimizer} --train.precision {precision} --dry-run"))
    parameters, state = (re.search(rf"{part} ([\d.]+ k?B)", told["memory"])[1] for part in ("parameters", "optimiser"))
    assert parameters == f"{650 * size / 1000:.1f} kB"
    assert state == (f"{650 * size * copies / 1000:.1f} kB" if copies else "0 B")


def test_a_model_that_looks_at_values_has_a_plan_without_its_activations(effray, tmp_path, monkeypatch):
    (tmp_path / "peeking.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def forward(self, x): return super().forward(x) if x.sum() < 1e9 else None\n"
        "def net(shape, num_classes): return Net(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    told = plan(effray("train --model peeking:net --dry-run"))
    assert told["model"] == "model: peeking:net, 650 parameters" and "activations" not in told["memory"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("lipt --resume one", "--dry-run is of a new run: what run one is to do, `effray show one` tells"),
        ("train --dataset folder:nowhere", "nowhere"),
        ("train --dataset.only s3://KEY:SECRET@bucket/x", "credentials in its URI"),
        ("deltagrad train --model resnet8", "BatchNorm"),
    ],
)
def test_a_mistake_is_told_as_by_the_run(refusal, arguments, message):
    assert message in refusal(f"{arguments} --dry-run")

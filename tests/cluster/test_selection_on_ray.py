"""Selection on Ray: the same picks on any number of workers, before and during training."""

import json

import pytest

from coreset_runs import picks, run

PLAIN = ["--model", "mlp", "--train.precision", "float32", "--train.batch_size", "32", "--train.epochs", "4"]
CHOICES = {
    "gradmatch": ["--select.fraction", "0.2", "--select.every_epochs", "2", "--select.warm_epochs", "1"],
    "random": ["--select.fraction", "0.2", "--select.every_epochs", "1"],
    "infobatch": ["--select.every_epochs", "1"],
}


@pytest.mark.parametrize("rule", CHOICES)
def test_training_workers_select_together(ray, tmp_path, rule):
    for workers in ("1", "2"):
        options = ["--select.rule", rule, *CHOICES[rule], "--cluster.workers", workers]
        run("train", "--root", str(tmp_path), "--name", workers, *PLAIN, *options)
    one, two = (tmp_path / "train" / workers for workers in ("1", "2"))
    assert picks(one) == picks(two)
    bills = [json.loads((folder / "summary.json").read_text())["phases"] for folder in (one, two)]
    work = [[(bill["phase"], bill["forward"], bill["backward"]) for bill in phases] for phases in bills]
    assert work[0] == work[1]


@pytest.mark.parametrize("balanced", ["true", "false"])
@pytest.mark.parametrize("rule", ["craig", "glister"])
def test_actors_pick_as_one_process_does(ray, tmp_path, rule, balanced):
    root = ["--root", str(tmp_path)]
    run("train", *root, "--name", "model", *PLAIN, "--train.epochs", "1", "--cluster.workers", "0")
    chosen = ["--model-from", "model", "--precision", "float32", "--rule", rule, "--balanced", balanced]
    for workers in ("0", "3"):
        run("select", *root, "--name", workers, *chosen, "--cluster.workers", workers)
    assert picks(tmp_path / "select/0") == picks(tmp_path / "select/3")

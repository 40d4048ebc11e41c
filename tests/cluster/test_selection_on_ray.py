"""Selection on Ray: the same picks on any number of workers or actors, before and during training, for any target."""

import csv
import json

import pytest
import torch

from ray_runs import picks, run
from raypkg.core.seeds import generator

PLAIN = ["--model", "mlp", "--train.precision", "float32", "--train.batch_size", "32"]
C, D = 3, 6
CHOICES = {
    "gradmatch": ["--select.fraction", "0.2", "--select.every_epochs", "2", "--select.warm_epochs", "1"],
    "random": ["--select.fraction", "0.2", "--select.every_epochs", "1"],
    "grand": ["--select.fraction", "0.2", "--select.every_epochs", "2", "--set", "select.options.gradients=full"],
    "infobatch": ["--select.every_epochs", "1"],
}


@pytest.fixture
def tables(tmp_path):
    """Return the names of a data set and of a few samples that differ from it."""
    names = []
    for name, count, shift in (("all", 240, 0.0), ("few", 15, 2.0)):
        folder = tmp_path / name
        folder.mkdir()
        names.append(f"table:{folder}")
        x = torch.randn(count, D, generator=generator(0, name)) + shift * torch.eye(D)[0]
        for split in ("train", "test"):
            with open(folder / f"{split}.csv", "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow([*"abcdef", "label"])
                writer.writerows([*row, i % C] for i, row in enumerate(x.tolist()))
    return names


@pytest.mark.parametrize("rule", CHOICES)
def test_training_workers_select_together(ray, tmp_path, rule):
    options = [*PLAIN, "--train.epochs", "4", "--select.rule", rule, *CHOICES[rule]]
    one, two = (run(tmp_path, "train", count, *options, "--cluster.workers", count) for count in ("1", "2"))
    assert picks(one) == picks(two)
    bills = [json.loads((folder / "summary.json").read_text())["phases"] for folder in (one, two)]
    work = [[(bill["phase"], bill["forward"], bill["backward"]) for bill in phases] for phases in bills]
    assert work[0] == work[1]


@pytest.mark.parametrize("balanced", ["true", "false"])
@pytest.mark.parametrize("rule", ["craig", "glister", "gradmatch"])
def test_actors_pick_as_one_process_does(ray, tmp_path, tables, rule, balanced):
    everything, few = tables
    data = ["--dataset", everything]
    run(tmp_path, "train", "model", *data, *PLAIN, "--train.epochs", "1", "--cluster.workers", "0")
    chosen = [*data, "--model-from", "model", "--precision", "float32", "--rule", rule, "--balanced", balanced]
    found = []
    for number, target in enumerate(([], ["--target", few])):
        for count in ("0", "3"):
            name = f"{number}-{count}"
            found.append(picks(run(tmp_path, "select", name, *chosen, *target, "--cluster.workers", count)))
    assert found[0] == found[1] != found[2] == found[3]


@pytest.mark.parametrize("balanced", ["true", "false"])
def test_actors_average_full_gradients_over_models_as_one_process_does(ray, tmp_path, tables, balanced):
    data = ["--dataset", tables[0], "--dataset.validation", "0"]
    for seed in ("0", "1"):
        short = ["--train.epochs", "1", "--cluster.workers", "0"]
        run(tmp_path, "train", f"m{seed}", *data, *PLAIN, "--seed", seed, *short)
    chosen = [*data, "--model-from", "m0,m1", "--rule", "grand", "--preset", "published", "--balanced", balanced]
    one, three = (run(tmp_path, "select", count, *chosen, "--cluster.workers", count) for count in ("0", "3"))
    assert picks(one) == picks(three)
    bills = [json.loads((folder / "summary.json").read_text())["phases"][0] for folder in (one, three)]
    assert [(bill["forward"], bill["backward"]) for bill in bills] == [(4 * 240, 2 * 240)] * 2


@pytest.mark.parametrize("command", ["train", "lipt"])
def test_workers_select_for_a_target_together(ray, tmp_path, tables, command):
    everything, few = tables
    select = ["--select.rule", "gradmatch", "--select.fraction", "0.3", "--select.target", few]
    options = {
        "train": ["--select.every_epochs", "2", "--train.epochs", "4"],
        "lipt": ["--train.epochs", "2", "--pretrain.models", "2", "--pretrain.epochs", "1"],
    }[command]
    given = ["--dataset", everything, *PLAIN, *select, *options]
    one, two = (picks(run(tmp_path, command, count, *given, "--cluster.workers", count)) for count in ("1", "2"))
    assert one == two

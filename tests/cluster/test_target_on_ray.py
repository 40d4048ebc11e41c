"""A selection for another data set's samples on Ray: the same picks on any number of actors or workers."""

import csv

import pytest
import torch

from coreset_runs import picks, run
from raypkg.core.seeds import generator

PLAIN = ["--model", "mlp", "--train.precision", "float32", "--train.batch_size", "32"]
C, D = 3, 6


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


@pytest.mark.parametrize("balanced", ["true", "false"])
@pytest.mark.parametrize("rule", ["craig", "gradmatch"])
def test_actors_select_for_a_target_as_one_process_does(ray, tmp_path, tables, rule, balanced):
    everything, few = tables
    root = ["--root", str(tmp_path / "runs"), "--dataset", everything]
    run("train", *root, "--name", "model", *PLAIN, "--train.epochs", "1", "--cluster.workers", "0")
    chosen = ["--model-from", "model", "--precision", "float32", "--rule", rule, "--balanced", balanced]
    for workers, target in (("0", few), ("3", few), ("plain", None)):
        aimed = ["--target", target] if target else []
        count = workers if target else "0"
        run("select", *root, "--name", workers, *chosen, *aimed, "--cluster.workers", count)
    alone, shared, plain = (picks(tmp_path / "runs/select" / name) for name in ("0", "3", "plain"))
    assert alone == shared != plain


@pytest.mark.parametrize("command", ["train", "lipt"])
def test_workers_select_for_a_target_together(ray, tmp_path, tables, command):
    everything, few = tables
    options = {
        "train": ["--select.every_epochs", "2", "--train.epochs", "4"],
        "lipt": ["--train.epochs", "2", "--pretrain.models", "2", "--pretrain.epochs", "1"],
    }
    for workers in ("1", "2"):
        root = ["--root", str(tmp_path / "runs"), "--name", workers, "--dataset", everything]
        select = ["--select.rule", "gradmatch", "--select.fraction", "0.3", "--select.target", few]
        run(command, *root, *PLAIN, *select, *options[command], "--cluster.workers", workers)
    one, two = (picks(tmp_path / "runs" / command / workers) for workers in ("1", "2"))
    assert one == two

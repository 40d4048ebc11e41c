"""Wrong labels, long tails and near-duplicates as a user asks for them: recorded, told, resumed."""

import tomllib

import pyarrow.parquet as pq
import pytest

from raypkg.core.config import load_settings
from raypkg.experiments.train import TrainSettings
from raypkg.phases.samples import open_samples
from raypkg.runs.folder import RunFolder, find

NOISY = "train --model linear --train.epochs 2 --seed 3 --dataset.noise 0.4 --dataset.imbalance 0.2 --dataset.repeat 2"
PICKS = f"{NOISY} --select.method el2n --select.fraction 0.2 --name picks"


def test_what_was_done_to_the_labels_is_in_the_run(effray, after, tmp_path):
    after(PICKS)
    config = tomllib.loads((tmp_path / "runs/train/picks/config.toml").read_text())
    assert config["dataset"] | {"digest": ""} == {
        "name": "digits", "options": {}, "validation": 0.1, "digest": "",
        "noise": 0.4, "imbalance": 0.2, "repeat": 2, "seed": 3,
    }  # fmt: skip
    assert "wrong labels: " in effray("show picks")


def test_the_precision_of_a_selection_is_measured_against_the_true_labels(after, tmp_path):
    after(PICKS)
    run = find("runs", "train", "picks")
    samples = open_samples(load_settings(TrainSettings, run.config))
    split = samples.data.train
    picked = pq.read_table(tmp_path / "runs/train/picks/coreset.parquet")["index"].to_pylist()
    wrong = float((split.y[picked] != split.truth[picked]).double().mean())
    assert run.summary["coreset_wrong_labels"] == pytest.approx(wrong)
    assert run.summary["wrong_labels"] == pytest.approx(0.4, abs=0.03)


def test_a_run_whose_labels_were_drawn_is_resumed_with_the_same_ones(effray, call, tmp_path, monkeypatch):
    finish = RunFolder.finish
    monkeypatch.setattr(RunFolder, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "interrupted" in call(f"{NOISY} --name one").err
    monkeypatch.setattr(RunFolder, "finish", finish)
    effray("train --resume one")
    effray(f"{NOISY} --name straight")
    one, straight = (find("runs", "train", name).summary for name in ("one", "straight"))
    assert one["test_loss"] == straight["test_loss"]
    assert one["wrong_labels"] == straight["wrong_labels"]


def test_a_stored_config_with_another_seed_keeps_the_labels_that_it_was_drawn_with(effray, after, tmp_path):
    after(PICKS)
    effray("train --config runs/train/picks/config.toml --seed 4 --name other")
    digest = {
        tomllib.loads((tmp_path / f"runs/train/{name}/config.toml").read_text())["dataset"]["digest"]
        for name in ("picks", "other")
    }
    assert len(digest) == 1


def test_options_that_would_do_nothing_are_refused(refusal):
    assert "dataset.seed = 1: there is no dataset.noise" in refusal("train --dataset.seed 1")

"""Wrong labels, long tails and repeated samples on the command line: stored, reported, resumed."""

import tomllib

import pyarrow.parquet as pq
import pytest

import samples
from raypkg.core.config import load_settings
from raypkg.experiments.samples import open_samples
from raypkg.experiments.train import TrainSettings
from raypkg.runs.catalog import find

NOISY = "train --model linear --train.epochs 2 --seed 3 --dataset.noise 0.4 --dataset.imbalance 0.2 --dataset.repeat 2"
PICKS = f"{NOISY} --select.rule el2n --select.fraction 0.2 --name picks"


def test_the_run_records_its_regimes_and_its_selection_is_measured_against_the_true_labels(effray, after, tmp_path):
    after(PICKS)
    config = tomllib.loads((tmp_path / "runs/train/picks/config.toml").read_text())
    assert config["dataset"] | {"digest": ""} == {
        "name": "digits", "options": {}, "validation": 0.1, "digest": "",
        "noise": 0.4, "imbalance": 0.2, "repeat": 2, "seed": 3,
    }  # fmt: skip
    assert "wrong labels: " in effray("show picks")
    run = find("runs", "train", "picks")
    split = open_samples(load_settings(TrainSettings, run.config)).data.train
    picked = pq.read_table(tmp_path / "runs/train/picks/coreset.parquet")["index"].to_pylist()
    wrong = float((split.y[picked] != split.truth[picked]).double().mean())
    assert run.summary["coreset_wrong_labels"] == pytest.approx(wrong)
    assert run.summary["wrong_labels"] == pytest.approx(0.4, abs=0.03)


def test_options_without_effect_are_refused(refusal):
    for line, message in (
        ("--dataset.seed 1", "dataset.seed = 1: there is no dataset.noise"),
        ("--dataset.window 9", "dataset.window = 9: it has no effect without dataset.streamed"),
        ("--dataset.streamed ''", "dataset.streamed"),
        ("--model linear --dataset.streamed stores", "the samples of 'digits' are in memory"),
    ):
        assert message in refusal(f"train {line}")


def test_lipt_of_streamed_samples_is_that_of_local_ones_and_methods_that_need_all_refuse_them(
    effray, refusal, tmp_path
):
    images = [samples.encode(image) for image in samples.pixels(300)]
    for split in ("train", "test"):
        samples.write_parquet(tmp_path / "data" / f"{split}.parquet", images, [0, 1, 2] * 100)
    for command in ("crest", "deltagrad train"):
        message = refusal(f"{command} --model linear --dataset parquet:data --dataset.streamed stores")
        assert "draws from all samples at any time" in message
    line = "lipt --model linear --dataset parquet:data --pretrain.models 3 --pretrain.epochs 2 --train.epochs 2"
    effray(f"{line} --select.fraction 0.3 --name local")
    effray(f"{line} --select.fraction 0.3 --name streamed --dataset.streamed stores")
    local, streamed = (find("runs", "lipt", name) for name in ("local", "streamed"))
    assert local.storage.read("model.safetensors") == streamed.storage.read("model.safetensors")
    picks = [pq.read_table(tmp_path / f"runs/lipt/{name}/coreset.parquet")["index"] for name in ("local", "streamed")]
    assert picks[0].equals(picks[1])

"""What a user gets wrong: one line that says what and how to mend it, exit code 2, and no run folder left."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import samples
from raypkg.experiments.train import TrainSettings
from raypkg.runs.folder import RunFolder
from raypkg.studies.study import Order, create_study

CODE = """
import torch
from raypkg.data.split import Split

def rows(root, *, split):
    y = torch.arange(40) % 2
    return Split.from_tensors(torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), y)

def broken(root, *, split):
    raise RuntimeError("a mistake in the user's code")

def convolution(shape, num_classes):
    return torch.nn.Conv2d(1, 1, 1)
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    (tmp_path / "faulty_code.py").write_text(CODE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("faulty_code", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("lipt --nme x", "No such option '--nme'.*--name"),
        ("lipt --model torchvision:resnt18", "unknown torchvision model 'resnt18', did you mean 'resnet18'"),
        ("lipt --dataset.augment crop,flop", "unknown augmentation 'flop', did you mean 'flip'"),
        ("lipt --track wanb", "unknown track.name 'wanb', did you mean 'wandb'"),
        ("lipt --set selct.rule=random", "unknown setting 'selct', did you mean 'select'"),
        ("lipt --set select.rull=random", "unknown setting 'select.rull', did you mean 'select.rule'"),
        ("lipt --set select.options.lamb=1", "unknown gradmatch option 'lamb', did you mean 'lam'"),
        ("lipt --set select.options.lam=-1", "gradmatch option lam = -1: .* greater than or equal to 0"),
        ("lipt --set model.options.width=wide", "resnet8 option width = 'wide': .* integer"),
        ("lipt --set dataset.options.size=8", "unknown digits option 'size'. Allowed: none"),
        ("crest --budget 0", "budget = '0': input should be greater than 0"),
        ("crest --budget 0.01", "budget = 0.01 of 40 epochs is 0.4 epochs: it must be whole, such as --budget 0.025"),
        ("crest --crest.tau 0 --crest.h 2", "crest.tau = 0, without a local model: crest.h = 2.0 would do nothing"),
        (
            "crest --crest.subset 0.01",
            "crest.subset = 0.01 of 1295 samples is 13, fewer than the 128 of train.batch_size",
        ),
        ("crest --train.batch_size 2000", "train.batch_size = 2000: there are only 1295 samples to choose from"),
        ("crest --selection craigg", "unknown selection 'craigg', did you mean 'craig'"),
        ("crest --crest.actors 2", "crest.actors = 2: give cluster.workers too"),
        ("crest --selection random --crest.tau 0.2", "selection = random: crest.. belongs to crest"),
        ("crest --every-epochs 3", "selection = crest: every_epochs = 3 would do nothing"),
        ("crest --selection craig --every_epochs 50", "every_epochs = 50 at most the 40 epochs"),
        ("crest --selection craig --budget 1", "budget = 1 must be below 1"),
        (
            "crest --train.epochs 10 --train.warmup 0.01",
            "train.warmup = 0.01 of the budget's 11 steps is less than one step",
        ),
        ("crest --select.tau 0.1", "--select.tau is now called --crest.tau"),
        ("crest --select.drop_every 9", "--select.drop-every is now called --crest.exclude_every_steps"),
        ("crest --set select.alpha=0", "select is now called crest"),
        ("train --train.drop 0.1", "--train.drop is now called --train.lr_drop"),
        ("train --select.every 1", "--select.every is now called --select.every_epochs"),
        ("train --set train.evaluate_every=1", "train.evaluate_every is now called train.evaluate_every_epochs"),
        ("sparse --correction agent", "--correction is now called --agent"),
        ("train --track none", "name = none is now called false"),
        ("sparse --density 0.2 --growth none", "growth = none is now called false"),
        ("lipt --pretrain.sparsity none", "sparsity = none is now called false"),
        ("train --hooks none_such:Ema", "unknown hook or module 'none_such:Ema'"),
        ("train --select.rule random", "random with select.fraction = 1 would keep every sample"),
        ("deltagrad train --hooks agent", "hooks = agent: DeltaGrad replays plain SGD"),
        ("lipt --select.fraction 1.5", "select.fraction = '1.5': input should be less than or equal to 1"),
        ("train --select.rule infobatch", "infobatch keeps as many samples as it sees fit, anew at every epoch"),
        ("lipt --select.rule infobatch", "infobatch acts at every epoch of a training"),
        (
            "train --select.rule forgetting --select.fraction 0.5",
            "forgetting needs the record of a training that saw these samples",
        ),
        ("select --rule grand", "select needs a model: give --model-from RUN"),
        ("lipt --dataset.validation 1", "dataset.validation = '1': input should be less than 1"),
        ("lipt --pretrain.models 5000", "5000 disjoint shards of 0 samples each cannot be had from 1295 samples"),
        ("lipt --pretrain.models 200", r"a shard of 6 samples holds none of class 8 \(125 samples\): use fewer or"),
        ("lipt --pretrain.models 4 --pretrain.shard_fraction 0.3", "0.3 for 4 disjoint shards: at most 1/4 = 0.25"),
        ("lipt --pretrain.merge greedy --dataset.validation 0", "'greedy' needs held-out samples"),
        ("lipt --model torchvision:resnet18", "the models of torchvision take 3 channels"),
        ("lipt --dataset digits:here", "'digits' ships with the package and takes no path"),
        ("train --root nowhere://x", "cannot use 'nowhere://x' as a folder"),
        ("train --root /proc/x", "cannot write '/proc/x/train/"),
        ("data parquet:nowhere", "parquet path 'nowhere' does not exist"),
        ("data folder:nowhere", "folder 'nowhere' has no train split"),
    ],
)
def test_what_is_refused(refusal, arguments, message):
    assert re.search(message, refusal(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model faulty_code:convolution", "'faulty_code:convolution' maps inputs"),
        ("--dataset faulty_code:rows", r"input shape \(2,\): this model takes images .* use 'mlp' or 'linear'"),
        ("--dataset faulty_code:rows --model linear --dataset.augment crop", "are no images: leave out crop"),
    ],
)
def test_the_user_s_own_code(refusal, own_code, arguments, message):
    assert re.search(message, refusal(f"lipt --pretrain.models 2 --pretrain.randaugment true {arguments}"))


def test_a_bug_in_the_user_s_code_leaves_its_traceback_but_no_run_folder(call, own_code, tmp_path):
    with pytest.raises(BaseException, match="a mistake in the user's code"):
        call("effray train --dataset faulty_code:broken")
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_name_that_exists_is_refused_and_a_resumed_run_keeps_its_settings(refusal, effray):
    effray("train --name one --model linear --train.epochs 1")
    before = Path("runs/train/one/model.safetensors").read_bytes()
    message = refusal("train --name one --model linear --train.epochs 1")
    assert "run 'one' exists in" in message and "give another --name, or resume it with --resume one" in message
    assert Path("runs/train/one/model.safetensors").read_bytes() == before
    assert "unknown train run in" in (message := refusal("train --resume oen")) and "did you mean 'one'" in message
    for setting in ("--train.epochs 2", "--set seed=1", "--config mine.toml", "--name two"):
        message = refusal(f"train --resume one {setting}")
        assert re.search("--resume one keeps the settings: .* cannot change, only cluster.* and track.*", message)


@pytest.mark.parametrize("phase", ["pretrain", "train"])
def test_a_loss_that_is_not_finite(refusal, phase):
    message = refusal(f"lipt --model linear --{phase}.lr 1e30 --pretrain.models 2 --name one", leaves=phase == "train")
    found = re.search(rf"the loss became nan in epoch (\d) of phase '{phase}' .*: lower the learning rate", message)
    assert found
    if phase == "train":
        newest = sorted(Path("runs/lipt/one/checkpoints/train").iterdir())[-1]
        assert newest.name == f"epoch_{int(found[1]) - 1:05d}.pt"
        assert f"the checkpoint of epoch {int(found[1]) - 1} stays" in message


def test_interrupted_before_any_result(refusal, monkeypatch):
    def phase(folder, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "phase", phase)
    assert refusal("train --name one --model linear") == "effray: interrupted\n"


IMAGES = [samples.encode(image) for image in samples.pixels(9)]
LABELS = np.arange(9) % 3


def test_a_damaged_cache_is_built_again(call, effray, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("EFFRAY_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        samples.write_parquet(tmp_path / "set" / f"{split}.parquet", IMAGES, LABELS)
    before = effray("data parquet:set")
    store = next((tmp_path / "cache").glob("*train*.arrow"))
    whole = store.read_bytes()
    store.write_bytes(whole[: len(whole) // 2])
    assert call("effray data parquet:set").out == before
    assert "is damaged and is built again" in caplog.text
    assert store.read_bytes() == whole


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"index": [5000], "weight": [1.0]}, "has index 5000, this data set ends at 1436"),
        ({"index": [1, None], "weight": [1.0, 1.0]}, "column index is int64 with 1 nulls, which it cannot be"),
        ({"index": [1, 2], "weight": [0.0, 0.0]}, "all 2 weights of mine.parquet are 0: nothing would be trained"),
        ({"index": pa.array([], pa.int64()), "weight": pa.array([], pa.float32())}, "holds no sample"),
    ],
)
def test_coreset_files(refusal, tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "mine.parquet")
    assert message in refusal("train --coreset mine.parquet --model linear")


@pytest.mark.parametrize("option", ["--coreset .", "--coreset runs", "--dataset.only=", "--dataset.only ."])
def test_a_folder_is_no_coreset(refusal, tmp_path, option):
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs" / "note").touch()
    assert "is no coreset file" in refusal(f"train --model linear {option}")


def test_a_model_of_other_samples_does_not_select(refusal, effray):
    effray("train --name one --model linear --train.epochs 1")
    for option, message in [
        ("--seed 1", "seed 0, here it is 1"),
        ("--dataset.validation 0", "validation 0.1, here it"),
    ]:
        assert message in refusal(f"select --model-from one --rule grand {option}")


def test_a_selection_that_would_never_come(refusal):
    few = "train --model linear --train.epochs 2 --select.fraction 0.1"
    assert "select.warm_epochs = 2 of 2 epochs: nothing would be" in refusal(f"{few} --select.warm_epochs 2")
    assert "select.every_epochs = 3: only 2 epochs follow" in refusal(f"{few} --select.every_epochs 3")
    assert "select.warm_epochs = 40 of 40 epochs: nothing" in refusal(
        "lipt --select.warm_epochs 40"
    )  # before its pre-training


@pytest.fixture
def two_runs(effray):
    options = "--model linear --train.epochs 2 --select.fraction 0.2 --select.rule grand --select.warm_epochs 1"
    for name in ("one", "two"):
        effray(f"train --name {name} {options}")


@pytest.mark.parametrize("file", ["coreset.parquet", "scores.parquet"])
@pytest.mark.parametrize("columns", [None, {"a": [1]}, {"index": ["x"], "weight": [1.0]}, {"index": pa.nulls(0)}])
def test_runs_whose_files_were_damaged_are_not_compared(refusal, two_runs, file, columns):
    path = Path("runs/train/two", file)
    summary = Path("runs/train/two/summary.json")
    if columns is None:
        path.unlink()
    else:
        pq.write_table(pa.table(columns), path)
    assert f"runs/train/two/{file} " in refusal("show one --against two")
    if columns is not None:  # a run of a version that kept no digests
        facts = json.loads(summary.read_text())
        summary.write_text(json.dumps({**facts, "files": {}}))
        assert f"runs/train/two/{file}" in refusal("show one --against two")


def test_runs_without_a_coreset_or_an_end_are_not_compared(refusal, effray):
    effray("train --name one --model linear --train.epochs 1 --select.fraction 0.5")
    effray("train --name two --model linear --train.epochs 1")
    assert "two saved no coreset: there is no coreset.parquet to compare" in refusal("show one --against two")
    Path("runs/train/two/summary.json").unlink()
    assert "two is not finished: there is no coreset.parquet to compare" in refusal("show one --against two")
    assert "run 'two' is not finished: it has no model yet" in refusal("select --model-from two --rule grand")


def test_a_run_to_compare_with_that_is_no_run_is_refused(refusal, effray, tmp_path):
    effray("train --name one --model linear --train.epochs 1")
    order = Order(experiment="train", metric="accuracy", mode="max", samples=1)
    create_study(str(tmp_path / "runs"), "several", order, TrainSettings(), "", [])
    assert "several is a sweep, and only runs are compared" in refusal("show one --against several")
    assert "several is a sweep, and only runs are compared" in refusal("show several --against one")
    assert "unknown run in runs ''. Allowed: one" in refusal("show one --against=")
    assert "several is a sweep, and only runs are exported: give one of its trials" in refusal("export several")

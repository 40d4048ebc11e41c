"""What a user gets wrong: one line that says what and how to mend it, exit code 2, and no run folder left."""

import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypkg.experiments.train import TrainSettings
from raypkg.studies.study import Order, create_study


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("lipt --nme x", "No such option '--nme'.*--name"),
        ("lipt --model torchvision:resnt18", "unknown torchvision model 'resnt18', did you mean 'resnet18'"),
        ("lipt --set select.rull=random", "unknown setting 'select.rull', did you mean 'select.rule'"),
        ("lipt --set select.options.lamb=1", "unknown gradmatch option 'lamb', did you mean 'lam'"),
        ("lipt --set select.options.lam=-1", "gradmatch option lam = -1: .* greater than or equal to 0"),
        ("lipt --set model.options.width=wide", "resnet8 option width = 'wide': .* integer"),
        ("lipt --set dataset.options.size=8", "unknown digits option 'size'. Allowed: none"),
        ("crest --crest.tau 0 --crest.h 2", "crest.tau = 0, without a local model: crest.h = 2.0 would do nothing"),
        ("crest --crest.subset 0.01", "of 1295 samples is 13, fewer than the 128 of train.batch_size"),
        ("train --select.rule ccs --select.fraction 0.5 --select.memory 1", "ccs caches nothing: select.memory = 1"),
        ("crest --train.batch_size 2000", "train.batch_size = 2000: there are only 1295 samples to choose from"),
        ("crest --selection random --crest.tau 0.2", "selection = random: crest.tau = 0.2 belongs to crest"),
        ("crest --selection craig --every_epochs 50", "every_epochs = 50 at most the 40 epochs"),
        ("lipt --select.warm_epochs 40", "select.warm_epochs = 40 of 40 epochs: nothing would be selected"),
        ("crest --set select.alpha=0", "select is now called crest"),
        ("train --set train.evaluate_every=1", "train.evaluate_every is now called train.evaluate_every_epochs"),
        ("deltagrad train --hooks agent", "hooks = agent: DeltaGrad replays plain SGD"),
        ("train --select.rule infobatch", "infobatch keeps as many samples as it sees fit, anew at every epoch"),
        ("train --select.rule forgetting --select.fraction 0.5", "forgetting needs the record of a training that"),
        ("select --rule grand", "select needs a model: give --model-from RUN"),
        ("lipt --pretrain.models 5000", "5000 disjoint shards of 0 samples each cannot be had from 1295 samples"),
        ("lipt --pretrain.models 200", r"a shard of 6 samples holds none of class 8 \(125 samples\): use fewer or"),
        ("lipt --model torchvision:resnet18", "expected input.* to have 3 channels"),
        ("list --root ''", "the name of a folder for runs is empty"),
    ],
)
def test_what_is_refused(refusal, arguments, message):
    assert re.search(message, refusal(arguments))


FAULTY = """from raypkg import Hook, Split
def data(root, *, split):
    raise RuntimeError("of mine")
def build(shape, num_classes):
    return {}["of mine"]
class Wrong(Hook):
    def on_step(self, run):
        raise ValueError("two\\nlines")
class Misused(Hook):
    def on_epoch(self, run): run.step.nothing
"""


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ("--dataset faulty_code:data", "line 3, in data: RuntimeError: of mine"),
        ("--model faulty_code:build", "line 5, in build: KeyError: 'of mine'"),
        ("--model linear --hooks faulty_code:Wrong", "line 8, in on_step: ValueError: two lines"),
        ("--model linear --hooks faulty_code:Misused", "line 10, in on_epoch: AttributeError: 'int' object has no"),
    ],
)
def test_a_mistake_in_the_user_s_code_is_his_file_and_line(refusal, tmp_path, monkeypatch, options, place):
    (tmp_path / "faulty_code.py").write_text(FAULTY)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert f"/faulty_code.py, {place}" in refusal(f"train {options} --train.epochs 1 --cluster.workers 0")


def test_a_name_that_exists_is_refused_and_a_resumed_run_keeps_its_settings(refusal, after):
    after("train --name one --model linear --train.epochs 1")
    before = Path("runs/train/one/model.safetensors").read_bytes()
    message = refusal("train --name one --model linear --train.epochs 1")
    assert "run 'one' exists in" in message and "give another --name, or resume it with --resume one" in message
    assert "run 'one' exists in" in refusal("train --name one --dry-run")
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


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"index": [1]}, "needs columns index and weight, has index"),
        ({"index": [5000], "weight": [1.0]}, "has index 5000, this data set ends at 1436"),
        ({"index": [1, None], "weight": [1.0, 1.0]}, "column index is int64 with 1 nulls, which it cannot be"),
        ({"index": [1, 2], "weight": [0.0, 0.0]}, "all 2 weights of mine.parquet are 0: nothing would be trained"),
        ({"index": pa.array([], pa.int64()), "weight": pa.array([], pa.float32())}, "holds no sample"),
    ],
)
def test_coreset_files(refusal, tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "mine.parquet")
    assert message in refusal("train --coreset mine.parquet --model linear")
    for option in ("--coreset .", "--dataset.only="):
        assert "it is not a regular file" in refusal(f"train --model linear {option}")


def write_table(shift=0.0):
    rows = [f"{i % 7 + shift},{i % 2},{i % 3 // 2}" for i in range(24)]
    for split in ("train", "test"):
        Path("mine", f"{split}.csv").write_text("\n".join(["a,label,kind", *rows]))


def test_a_coreset_and_a_model_of_other_samples_are_refused(call, refusal, tmp_path):
    (tmp_path / "mine").mkdir()
    write_table()
    table = "--dataset table:mine --dataset.validation 0"
    linear = f"{table} --model linear --train.epochs 1"
    assert call(f"train --name one {linear} --select.rule random --select.fraction 0.5").code == 0
    given = f"train {linear} --coreset runs/train/one/coreset.parquet"
    assert call(f"{given} --name two").code == 0
    other_label = refusal(f"{given} --set dataset.options.label=kind --dry-run")
    assert re.search(r"has sample \d+ in class '1', this data set in '0'", other_label)
    write_table(shift=0.5)
    for line in (given, f"{given} --dry-run", given.replace("--coreset", "--dataset.only")):
        assert "coreset.parquet was made for other samples of table:" in refusal(line)
    for line in (f"select {table} --model-from one --rule grand", f"select {table} --model-from one --dry-run"):
        assert "run one trained on other samples of table:" in refusal(line)


def test_runs_without_a_coreset_or_an_end_and_sweeps_are_not_compared(refusal, effray, tmp_path):
    effray("train --name one --model linear --train.epochs 1 --select.fraction 0.5")
    effray("train --name two --model linear --train.epochs 1")
    for option, message in {
        "--seed 1": "seed 0, here it is 1",
        "--dataset.validation 0": "validation 0.1, here",
    }.items():
        assert message in refusal(f"select --model-from one --rule grand {option}")  # of other samples
    assert "two saved no coreset: there is no coreset.parquet to compare" in refusal("show one --against two")
    Path("runs/train/two/summary.json").unlink()
    assert "two is not finished: there is no coreset.parquet to compare" in refusal("show one --against two")
    assert "run 'two' is not finished: it has no model yet" in refusal("select --model-from two --rule grand")
    order = Order(experiment="train", metric="accuracy", mode="max", samples=0)
    create_study(str(tmp_path / "runs"), "several", order, TrainSettings(), "", [])
    for line in ("show one --against several", "show several --against one"):
        assert "several is a sweep, and only runs are compared" in refusal(line)
    assert "unknown run in runs ''. Allowed: one" in refusal("show one --against=")
    assert "several is a sweep, not a run: give one of its trials" in refusal("export several")

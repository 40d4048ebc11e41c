"""`effray embed` as a user types it, what other commands make of its rows, and what it refuses."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raypkg.core.settings import Dataset, RunSettings
from raypkg.data import load_data
from raypkg.experiments.samples import open_samples
from raypkg.methods.deltagrad.run import open_recorded
from raypkg.runs.catalog import locate

HERE = "--cluster.workers 0"
EMBED = f"embed --name one --model mlp --rows-per-part 400 {HERE}"
DRAWN = f"embed --name drawn --model resnet8 --draws 2 --rows-per-part 800 {HERE}"
ROWS = "table:runs/embed/one"
SHORT = "--train.epochs 2 --train.batch_size 400"


@pytest.mark.parametrize(
    "command",
    [
        f"lipt --dataset {ROWS} --model linear --train.epochs 1 --pretrain.models 2 --pretrain.epochs 1",
        f"crest --dataset {ROWS} --model mlp --train.epochs 4 --budget 0.5",
        f"embed --dataset {ROWS} --model mlp {HERE}",
    ],
)
def test_other_commands_take_the_rows(effray, refusal, after, command):
    after(EMBED)
    out = effray("show one")
    assert "1,437 training and 360 test rows of 100 features" in out and "coreset" not in out
    effray(f"{command} --name of_rows")
    if command.startswith("crest"):
        line = refusal(f"embed --model-from of_rows --dataset digits {HERE}")
        assert "the model of run 'of_rows' takes samples of shape [100], those here have [1, 8, 8]" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model mlp --model-from one", "give one of --model NAME and --model-from RUN"),
        ("--model-from one --set model.options.width=3", "model.options would do nothing"),
        ("--model resnt8", "unknown model 'resnt8', did you mean 'resnet8'"),
        ("--model mlp --dataset.only c.parquet", "dataset.only: embed takes every sample"),
        ("--model mlp --dataset.augment crop", "dataset.augment would do nothing"),
        ("--model mlp --dataset.validation 0.2", "dataset.validation"),
        (f"--model mlp --dataset {ROWS} --draws 2", "has no augmentation"),
    ],
)
def test_options_that_contradict_are_refused(refusal, after, options, message):
    after(EMBED)
    assert message in refusal(f"embed {options} {HERE}")


def test_a_disk_that_is_too_small_is_told_before_anything_is_computed(refusal, monkeypatch):
    monkeypatch.setattr("raypkg.experiments.embedding.shutil.disk_usage", lambda folder: type("", (), {"free": 1000}))
    line = refusal(EMBED)
    assert "1,437 training and 360 test rows of 100 features, about 748 kB, and as much again" in line
    assert "has 1 kB left" in line


# DeltaGrad in the ids of the data


def deleted():
    """Return the ids and the positions of the samples that run ``a`` no longer uses."""
    with open_recorded(locate("runs", "a")) as recorded:
        held = torch.zeros(len(recorded.split), dtype=torch.bool)
        held[recorded.samples.held_out] = True
        gone = (~recorded.active & ~held).nonzero()[:, 0]
        return recorded.split.ids[gone].tolist(), gone.tolist()


def samples_of(run):
    return open_samples(RunSettings(dataset=Dataset(name=f"table:{Path(f'runs/embed/{run}').absolute()}")))


@pytest.fixture
def recorded(effray, after):
    """Make a recorded run ``a`` on rows in another order: an id is no position any more."""
    after(EMBED)
    table = pq.read_table(file := "runs/embed/one/train.parquet")
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    pq.write_table(table.take(order.numpy()).cast(table.schema), file)
    effray(f"deltagrad train --name a --dataset {ROWS} {SHORT}")


def test_deltagrad_deletes_and_restores_by_the_ids_of_the_data(effray, recorded):
    samples = samples_of("one")
    positions = samples.train_indices[:3].tolist()
    ids = samples.data.train.ids[positions].tolist()
    assert ids != positions
    effray(f"deltagrad delete a --ids {','.join(map(str, ids))}")
    assert deleted() == (ids, positions)
    effray(f"deltagrad add a --ids {ids[1]}")
    assert deleted()[0] == [ids[0], ids[2]]
    effray("deltagrad verify a")


def test_samples_that_are_added_are_numbered_on_from_the_largest_id(effray, refusal, recorded):
    line = refusal("deltagrad delete a --ids 99999")
    assert "delete: id 99999 is unknown, allowed are those of the data's column of ids, 0 … 1436" in line
    effray("deltagrad add a --data table:runs/embed/one/test.parquet")
    effray("deltagrad delete a --ids 1437,1438")
    assert deleted()[0] == [1437, 1438]


def test_an_id_or_condition_deletes_all_draws_of_its_sample(effray, refusal, after):
    after(DRAWN)
    effray(f"deltagrad train --name a --dataset table:runs/embed/drawn --dataset.validation 0 {SHORT}")
    assert "4 deleted" in effray("deltagrad delete a --ids 7,9")
    assert deleted() == ([7, 9, 7, 9], [7, 9, 1437 + 7, 1437 + 9])
    effray("deltagrad add a --ids 7,9")
    table = pq.read_table("runs/embed/drawn/train.parquet")
    features = np.stack(table["features"].to_numpy())
    first, second = features[[5, 1437 + 5]]
    column = int(abs(first - second).argmax())
    middle = (first[column] + second[column]) / 2
    sign = "<" if first[column] < second[column] else ">"
    label = table["label"][5]
    effray(f"deltagrad delete a --where 'features[{column}] {sign} {middle} and label = {label}'")
    gone, _ = deleted()
    assert set(map(gone.count, gone)) == {2} and 5 in gone
    assert "id 5 is deleted already" in refusal("deltagrad delete a --ids 5")
    effray("deltagrad add a --ids 5")
    assert deleted()[0].count(5) == 0


# Ids and vectors of tables that users bring


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "unknown id column of"),
        ({"key": [1.0, 2.0, 3.0]}, "id column 'key' of … is double, needed are integers"),
        ({"key": [1, None, 3]}, "column 'key' of … has no value in row 1"),
        ({"key": pa.array([1, 2**64 - 1, 3], pa.uint64())}, "not from 0 to 2⁶³ − 1 in row 1"),
        ({"key": [1, 2, 3], "v": pa.array([[1], [2], [3]], pa.list_(pa.int8(), 1))}, "needed are numbers, or lists of"),
        ({"key": [1, 2, 3], "v": pa.array([[1], None, [3]], pa.list_(pa.float32(), 1))}, "has no value somewhere"),
        ({"key": [1, 2, 3], "v": pa.array([[1], [math.nan], [3]], pa.list_(pa.float32(), 1))}, "holds NaN in row 1"),
    ],
)
def test_ids_are_integers_and_vectors_are_floats(refusal, columns, message):
    pq.write_table(pa.table({"a": [0.5, 1.5, 2.5], "label": [0, 1, 0], **columns}), "mine.parquet")
    line = refusal("train --dataset table:mine.parquet --set dataset.options.id=key --model linear")
    for part in message.split(" … "):
        assert part in line


# What the plan, the list and the files say


def test_the_plan_tells_rows_width_and_bytes_as_they_will_be(effray):
    command = f"embed --name one --model resnet8 --draws 3 {HERE}"
    out = effray(f"{command} --dry-run")
    (told,) = [line for line in out.splitlines() if line.startswith("# rows: ")]
    assert not Path("runs").exists()
    effray(command)
    folder = Path("runs/embed/one")
    train, test = (pq.read_table(folder / f"{split}.parquet") for split in ("train", "test"))
    assert told.startswith(f"# rows: {len(train):,} training and {len(test):,} test rows of 64 features, about ")
    size = sum((folder / f"{split}.parquet").stat().st_size for split in ("train", "test"))
    number, unit = told.partition("about ")[2].split()[:2]
    assert float(number) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(size, rel=0.05)
    files = out.partition("# files: ")[2].split(" and ")[0].split()
    assert [file for file in files if not (folder / file).exists()] == []


def test_all_draws_of_a_sample_are_held_out_together_and_are_those_that_the_data_holds_out(effray, after):
    after(DRAWN)
    rows, data = samples_of("drawn"), open_samples(RunSettings())
    ids = rows.data.train.ids
    assert ids[rows.held_out].sort().values.tolist() == sorted([*data.held_out.tolist()] * 2)
    assert ids[rows.train_indices].sort().values.tolist() == sorted([*data.train_indices.tolist()] * 2)


def test_a_coreset_of_rows_says_which_samples_they_stand_for(effray, recorded):
    effray(f"train --name base --dataset {ROWS} --model linear --train.epochs 1")
    effray("select --name picked --model-from base --dataset table:runs/embed/one --rule craig --fraction 0.01")
    ids = samples_of("one").data.train.ids
    for file in ("coreset.parquet", "scores.parquet"):
        table = pq.read_table(f"runs/select/picked/{file}")
        assert table["id"].to_pylist() == ids[table["index"].to_pylist()].tolist()
    picked = pq.read_table("runs/select/picked/coreset.parquet")
    effray("deltagrad delete a --ids runs/select/picked/coreset.parquet")
    assert sorted(deleted()[0]) == sorted(picked["id"].to_pylist())


def test_of_one_file_all_draws_of_a_sample_are_in_one_split(effray, after):
    after(DRAWN)
    data = load_data("table:runs/embed/drawn/train.parquet", cache=Path("cache"))
    train, test = (set(split.ids.tolist()) for split in data)
    assert not train & test
    assert len(data.test) == 2 * len(test) == 2 * round(0.2 * 1437)

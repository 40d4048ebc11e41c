"""A selection for a target, as a user types it."""

import csv
import tomllib

import pyarrow.parquet as pq
import pytest
import torch

from raypkg.core.seeds import generator

TRAIN = "train --name first --dataset table:all --model mlp --train.epochs 2"


@pytest.fixture
def tables(tmp_path):
    """Two domains of 60 rows each in ``all``, 12 rows like the second in ``few``, of which two columns are its own."""
    everything = rows("first", 60) + rows("second", 60)
    for name, content in (("all", everything), ("few", rows("second", 12, seed=1))):
        folder = tmp_path / name
        folder.mkdir()
        for split in ("train", "test"):
            with open(folder / f"{split}.csv", "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["a", "b", "c", "d", "label"])
                writer.writerows(content)


def rows(domain, count, seed=0):
    rng = generator(seed, domain)
    table = []
    for i in range(count):
        label = i % 2
        place = label + 2 * (domain == "second")
        x = 0.1 * torch.randn(4, generator=rng) + torch.eye(4)[place]
        table.append([*x.tolist(), "yes" if label else "no"])
    return table


def of_second(run):
    index = pq.read_table(f"runs/{run}/coreset.parquet")["index"].to_pylist()
    return sum(i >= 60 for i in index) / len(index)


def test_a_selection_for_a_few_rows_of_one_domain_is_stored_and_repeated(effray, tables, tmp_path):
    effray(TRAIN)
    effray("select --name one --model-from first --dataset table:all --fraction 0.2 --target table:few")
    assert of_second("select/one") > 0.9
    stored = tomllib.loads((tmp_path / "runs/select/one/config.toml").read_text())
    assert stored["target"]["name"] == f"table:{tmp_path}/few"
    effray("select --name two --config runs/select/one/config.toml")
    one, two = (pq.read_table(f"runs/select/{name}/coreset.parquet").to_pylist() for name in ("one", "two"))
    assert one == two


def test_lipt_and_reselection_take_a_target(effray, tables, tmp_path):
    effray(
        "lipt --name one --dataset table:all --model mlp --pretrain.models 2 --pretrain.epochs 1 --train.epochs 2"
        " --select.fraction 0.2 --select.target table:few"
    )
    assert of_second("lipt/one") > 0.9
    effray(
        "train --name two --dataset table:all --model mlp --train.epochs 4 --select.rule craig --select.fraction 0.2"
        " --select.every-epochs 2 --select.target.name table:few"
    )
    assert of_second("train/two") > 0.9
    stored = tomllib.loads((tmp_path / "runs/train/two/config.toml").read_text())
    assert stored["select"]["target"]["name"] == f"table:{tmp_path}/few"


def test_lipt_refuses_a_target_before_it_trains(refusal, tables, monkeypatch):
    monkeypatch.setattr("raypkg.methods.lipt.pretrain.Trainee", None)
    lipt = "lipt --dataset table:all --model mlp --select.target"
    assert "samples of shape" in refusal(f"{lipt} digits")
    line = refusal(f"{lipt}.name table:few --set select.target.options.labl=a")
    assert "unknown table option 'labl', did you mean 'label'" in line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--select.rule random --select.target valid", "random selects for no target: select.target = valid"),
        ("--select.rule craig --select.target table:none", "none' does not exist"),
        (
            "--select.rule craig --select.target valid --dataset.validation 0",
            "select.target = valid: no sample of class 'no' is held out",
        ),
    ],
)
def test_what_is_no_target_is_one_line(refusal, tables, given, message):
    options = "--dataset table:all --model mlp --train.epochs 2 --select.fraction 0.5"
    assert message in refusal(f"train --name one {options} {given}")

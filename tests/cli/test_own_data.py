"""A newcomer's way on data of his own: what a later command takes over from a run, and what refuses in one line."""

import tomllib
from pathlib import Path

import pytest
import torch

from raypkg import UserError, load_model
from raypkg.core.settings import Dataset
from raypkg.data.opening import open_data

TEXTS = "text\tlabel\n" + "".join(f"{'good' if i % 2 else 'bad'} film {i}\t{i % 2}\n" for i in range(40))
SHORT = "--train.epochs 1 --train.precision float32"
ROWS = "x,y,label\n" + "".join(f"{i % 2}.5,{i},{'ab'[i % 2]}\n" for i in range(40))


def config(run):
    return tomllib.loads(Path("runs", run, "config.toml").read_text())


def test_model_from_brings_the_data_set_its_options_and_the_seed(effray, refusal):
    Path("a.csv").write_text(ROWS)
    Path("b.csv").write_text(ROWS)
    data = "--dataset table:a.csv --set dataset.options.test=0.4 --dataset.validation 0.25 --seed 3"
    effray(f"train --name one {data} --model linear {SHORT}")
    effray("select --name some --model-from one --rule grand --fraction 0.5")
    effray("embed --name rows --model-from one --cluster.workers 0")
    trained = config("train/one")
    for run in ("select/some", "embed/rows"):
        taken = config(run)
        assert taken["seed"] == 3 and taken["dataset"]["name"].endswith("a.csv")
        assert taken["dataset"]["options"] == trained["dataset"]["options"]
    assert config("select/some")["dataset"] == trained["dataset"]
    effray("embed --name others --model-from one --dataset table:b.csv --seed 4 --cluster.workers 0")
    taken = config("embed/others")
    assert taken["dataset"]["name"].endswith("b.csv") and not taken["dataset"]["options"].get("test")
    assert taken["seed"] == 4
    # a training's file, with settings of which these commands have none
    for command in ("select --rule grand --fraction 0.5", "embed --cluster.workers 0"):
        effray(f"{command} --name filed --model-from one --config runs/train/one/config.toml --seed 3")
    assert config("select/filed")["dataset"] == trained["dataset"]
    assert "unknown run in runs 'none'" in refusal("select --model-from none --rule grand")


def test_a_model_whose_code_or_folder_is_elsewhere(effray, refusal, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"neither .* nor PYTHONPATH has a module 'my_code'"):
        from raypkg.models import build_model

        build_model("my_code:net", (4,), 2, seed=0)
    Path("runs/tune/several").mkdir(parents=True)
    for name in ("config.toml", "sweep.json"):
        Path("runs/tune/several", name).touch()
    with pytest.raises(UserError, match="several is a sweep, not a run: give one of its trials"):
        load_model("several", root="runs")
    assert "is a sweep" in refusal("train --train.from several --train.epochs 1 --model linear")
    assert "nowhere' does not exist" in refusal("train --dataset folder:nowhere")
    assert "did you mean 'craig'" in refusal("methods CRAIG")


def test_a_model_of_pairs_refuses_single_texts_and_is_opened_once(effray, refusal, monkeypatch):
    lines = TEXTS.splitlines()
    Path("a.tsv").write_text("premise\thypothesis\tlabel\n" + "".join(f"so\t{line}\n" for line in lines[1:]))
    effray(f"train --name one --dataset text:a.tsv --model transformer {SHORT}")
    Path("new.txt").write_text("a good film\n")
    assert "'new.txt' has single texts, the model takes pairs" in refusal("predict one new.txt")
    Path("new.csv").write_text("premise,hypothesis\nso,a good film\n")
    effray("predict one new.csv")
    opened = []
    opens = lambda chosen, *more: opened.append(chosen) or open_data(chosen, *more)  # noqa: E731
    monkeypatch.setattr("raypkg.data.opening.open_data", opens)
    monkeypatch.setattr("raypkg.experiments.prediction.open_data", lambda *given: pytest.fail("opened again"))
    effray("evaluate one")
    assert [type(chosen) for chosen in opened] == [Dataset]


def test_labels_under_both_names_reach_no_model():
    from torch.utils.data import DataLoader

    from raypkg import CoresetLoader

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(4, 2)

        def forward(self, pixels):
            return self.head(pixels)

    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    samples = [{"pixels": x[i], "label": i % 2, "labels": i % 2} for i in range(20)]
    loader = CoresetLoader(DataLoader(samples, batch_size=5), Model(), "grand", 0.5, epochs=1)
    assert all(set(batch) == {"pixels", "labels", "weights", "indices"} for batch in loader)

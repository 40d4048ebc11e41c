"""First weights of another training: what is taken, what is drawn anew, and what is refused."""

import pytest
import torch
from torch import nn

from raypkg.core.config import load_settings, parse_toml, to_toml
from raypkg.core.errors import UserError
from raypkg.core.settings import Train
from raypkg.experiments import experiment, settings_of
from raypkg.experiments.resolve import with_absolute_paths
from raypkg.experiments.trained import fitted
from raypkg.models.classifier import Classifier
from raypkg.studies.driver import varied


def model(inputs=4, width=5, classes=3):
    return Classifier(nn.Sequential(nn.Linear(inputs, width), nn.Linear(width, width)), nn.Linear(width, classes))


def test_what_is_taken_drawn_anew_and_unused_is_told():
    taken, line = fitted(model(classes=3), model(classes=10).state_dict(), "one")
    assert line == "first weights: 4 tensors from one; drawn anew: head.weight, head.bias" and len(taken) == 4
    tensors = model().state_dict() | {"teacher.weight": torch.ones(1)}
    del tensors["features.1.bias"]
    _, line = fitted(model(), tensors, "one")
    assert line.endswith("; drawn anew: features.1.bias; without a place here: teacher.weight")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (model(inputs=9), r"train.from = one: features.0.weight is \[5, 9\] there and \[5, 4\] in this model"),
        (Classifier(nn.Flatten(), nn.Linear(5, 3)), "no tensor fits this model: there it has head.weight, head.bias"),
        (nn.Flatten(), "no tensor fits this model: there it has none, here"),
    ],
)
def test_another_model_is_refused(other, message):
    with pytest.raises(UserError, match=message):
        fitted(model(), other.state_dict(), "one")


def test_a_head_alone_fits_where_the_model_is_no_more():
    linear = Classifier(nn.Flatten(), nn.Linear(5, 3))
    assert len(fitted(linear, linear.state_dict(), "one")[0]) == 2
    with pytest.raises(UserError, match="no tensor fits this model"):
        fitted(linear, Classifier(nn.Flatten(), nn.Linear(5, 9)).state_dict(), "one")


# The setting, whose name is a word of Python's


def test_the_setting_is_named_from_wherever_a_user_meets_it():
    schema = settings_of(experiment["train"])
    chosen = load_settings(schema, {"train": {"from": "one"}})
    assert chosen.train.from_ == "one"
    assert load_settings(schema, parse_toml(to_toml(chosen), "stored")) == chosen
    assert chosen.model_dump()["train"]["from"] == "one"
    assert varied(chosen, {"train.lr": 0.2}).train.from_ == "one"  # a trial of a sweep
    assert load_settings(schema, {}, {"train.from": "false"}).train.from_ is None
    with pytest.raises(UserError, match=r"unknown setting 'train.from_', did you mean 'train.from'\?"):
        load_settings(schema, {}, {"train.from_": "one"})
    with pytest.raises(UserError, match=r"train.from = 3: input should be a valid string"):
        load_settings(schema, {}, {"train.from": 3})


def test_a_path_that_exists_becomes_absolute_and_a_name_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.safetensors").touch()
    (tmp_path / "one").mkdir()  # no run
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "summary.json").touch()
    schema = settings_of(experiment["crest"])

    def stored(source):
        return with_absolute_paths(load_settings(schema, {}, {"train.from": source})).train.from_

    assert stored("some.safetensors") == str(tmp_path / "some.safetensors")
    assert stored("done") == str(tmp_path / "done")
    assert stored("one") == "one"
    assert Train().from_ is None

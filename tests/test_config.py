from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from raypkg.core.config import Named, Settings, leaves, load_settings, to_toml
from raypkg.core.errors import UserError


class Optim(Settings):
    lr: Annotated[float, Field(gt=0)] = 0.1
    rule: Literal["sgd", "adamw"] = "sgd"


class Model(Named):
    name: str = "mlp"


class Example(Settings):
    seed: int = 0
    optim: Optim = Optim()
    model: Model = Model()


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('seed = 1\nmodel = "resnet8"\n[optim]\nlr = 0.5\nrule = "adamw"\n')
    settings = load_settings(Example, file, {"optim.lr": "0.25", "model.options.width": 3})
    assert (settings.seed, settings.optim.lr, settings.optim.rule) == (1, 0.25, "adamw")
    assert (settings.model.name, settings.model.options) == ("resnet8", {"width": 3})


def test_toml_round_trip(tmp_path):
    settings = load_settings(Example, None, {"optim.lr": 0.3, "model": "linear", "model.options.a": [1, 2]})
    file = tmp_path / "a.toml"
    file.write_text(to_toml(settings))
    assert load_settings(Example, file) == settings


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Example().seed = 1


def test_leaves_are_dotted():
    assert [name for name, _ in leaves(Example)] == ["seed", "optim.lr", "optim.rule", "model.name", "model.options"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sed": 1}, "unknown setting 'sed', did you mean 'seed'"),
        ({"optim.lrr": 1}, r"unknown setting 'optim.lrr', did you mean 'optim.lr'\? Allowed: optim.lr, optim.rule"),
        ({"optim.rule": "sdg"}, "unknown optim.rule 'sdg', did you mean 'sgd'"),
        ({"optim.lr": 0}, "optim.lr = 0: input should be greater than 0"),
        ({"optim.lr": "x"}, "optim.lr = 'x': input should be a valid number"),
        ({"optim.lr": float("nan")}, "optim.lr = nan: input should be a finite number"),
        ({"seed": 1.5}, "seed = 1.5: input should be a valid integer"),
        ({"optim": 3}, "optim = 3"),
        ({"seed.deep": 3}, "seed = "),
    ],
)
def test_one_line_errors(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load_settings(Example, None, overrides)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the settings file .*missing.toml"):
        load_settings(Example, tmp_path / "missing.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("seed = = 1")
    with pytest.raises(UserError, match=r"bad.toml' is not valid TOML"):
        load_settings(Example, Path(bad))

"""Settings from files and the command line: one line that says what is wrong, or settings that are read back."""

import sys
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from raypkg.cli.setting_options import overrides as overrides_of
from raypkg.core.config import Named, Settings, leaves, load_settings, load_stored, parse_toml, read_toml, to_toml
from raypkg.core.errors import UserError, unknown
from raypkg.experiments.train import SelectSettings, TrainSettings
from raypkg.methods.crest.settings import CrestSettings
from raypkg.methods.deltagrad.settings import DeltaGradSettings
from raypkg.methods.lipt.settings import LiptSettings
from raypkg.methods.sparse.settings import SparseSettings


class Optim(Settings):
    lr: Annotated[float, Field(gt=0)] = 0.1
    rule: Literal["sgd", "adamw"] = "sgd"
    fast: bool = False
    shares: tuple[float, ...] = ()


class Model(Named):
    name: str = "mlp"


class Example(Settings):
    seed: int = 0
    optim: Optim = Optim()
    model: Model = Model()


EVERY = [name for name, _ in leaves(Example)]


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('seed = 1\nmodel = "resnet8"\n[optim]\nlr = 0.5\nrule = "adamw"\n')
    built = load_settings(Example, read_toml(file), {"optim.lr": "0.25", "model.options.width": 3})
    assert (built.seed, built.optim.lr, built.optim.rule) == (1, 0.25, "adamw")
    assert (built.model.name, built.model.options) == ("resnet8", {"width": 3})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sed": 1}, "unknown setting 'sed', did you mean 'seed'"),
        ({"optim.lrr": 1}, r"unknown setting 'optim.lrr', did you mean 'optim.lr'\? Allowed: optim.fast, optim.lr, "),
        ({"optim.rule": "sdg"}, "unknown optim.rule 'sdg', did you mean 'sgd'"),
        ({"optim.lr": 0}, "optim.lr = 0: input should be greater than 0"),
        ({"optim.lr": float("nan")}, "optim.lr = nan: input should be a finite number"),
        ({"seed": True}, "seed = True: input should be a number, neither true nor false"),
        ({"optim.fast": 1}, "optim.fast = 1: input should be true or false, not a number"),
        ({"seed": 2**63}, "seed = 9223372036854775808: input should be an integer of at most 64 bits"),
        ({"optim.rule": "x" * 5000}, "unknown optim.rule 'x+…x+'. Allowed: adamw, sgd"),
        ({"seed": [1, 2] * 5000}, r"seed = \[1, 2, 1, 2, 1, 2, ...\]: input should be a valid integer"),
        ({"a." * 5000 + "b": 1}, "unknown setting '.*': no setting has 5001 parts"),
    ],
)
def test_one_line_errors(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load_settings(Example, None, overrides)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [1, "1", 1.0, "1.0"])
def test_an_integer_may_be_written_as_a_whole_number(value):
    assert load_settings(Example, None, {"seed": value}).seed == 1


@pytest.mark.parametrize("option", [None, object(), "a\udcff", 2**63, [[1, None]]])
def test_what_toml_cannot_hold_is_refused_when_it_is_stored(option):
    with pytest.raises(UserError, match=r"(cannot be stored|a setting has an integer of more than 64 bits)"):
        to_toml(Example(model=Model(options={"a": option})))


def test_long_errors_stay_readable_and_keep_no_secret():
    message = str(UserError(f"cannot use s3://KEY:{'s' * 300}@bucket/{'x' * 5000}/end"))
    assert message.startswith("cannot use s3://***@bucket/xxx") and message.endswith("xxx/end") and len(message) < 300
    message = str(unknown("run", "y" * 5000, [f"run{number:04}" for number in range(5000)]))
    assert message.endswith("run0059, and 4940 more") and len(message) < 900


SMALL = settings(derandomize=True, deadline=None, max_examples=150)
NAMES = st.sampled_from([*EVERY, "optim", "model", "model.options.a", "model.options.a.b", "sed", "", ".", "seed.x"])
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["false", "true", "sgd"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
)


def assert_right(build) -> None:
    """Build settings that are read back equal, or be refused in one line."""
    try:
        built = build()
        stored = to_toml(built).encode()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return
    assert load_settings(Example, parse_toml(stored, "back")) == built


@SMALL
@given(st.dictionaries(NAMES | st.text(), VALUES, max_size=4))
def test_any_overrides(overrides):
    assert_right(lambda: load_settings(Example, None, overrides))


@SMALL
@given(st.text() | st.builds("{} = {}".format, NAMES, st.text() | VALUES), st.dictionaries(NAMES, SCALARS, max_size=2))
def test_any_file(text, overrides):
    assert_right(lambda: load_settings(Example, parse_toml(text, "file"), overrides))


@SMALL
@given(st.lists(st.text() | st.builds("{}={}".format, NAMES | st.text(), st.text() | VALUES), max_size=4))
def test_any_pairs(pairs):
    assert_right(lambda: load_settings(Example, None, overrides_of(Example, {}, pairs)))


def test_stored_settings_load_by_the_names_that_they_once_had_and_without_a_tracker_of_the_past():
    assert load_stored(TrainSettings, {"track": {"name": "mlflow", "project": "mine"}}).track.name is None
    stored = {"select": {"method": "craig", "every": 2}, "train": {"drop": 0.5}}
    settings = load_stored(TrainSettings, stored, {"cluster.workers": 0})
    assert settings.select.rule == "craig" and settings.select.every_epochs == 2 and settings.train.lr_drop == 0.5
    assert load_stored(SelectSettings, {"method": "grand", "model_from": "one"}).rule == "grand"
    with pytest.raises(UserError, match=r"select\.method is now called select\.rule"):
        load_settings(TrainSettings, stored)


def test_an_interrupt_while_settings_are_stored_stays_one():
    settings, before, places = TrainSettings(), sys.gettrace(), []

    def interrupt(frame, event, argument):  # at each call of Python code inside, one after another
        calls.append(frame.f_code.co_name)
        if len(calls) > len(places):
            places.append(frame.f_code.co_name)
            raise KeyboardInterrupt

    for _ in range(100):
        calls = []
        sys.settrace(interrupt)
        try:
            settings.model_dump(mode="json")
        except KeyboardInterrupt:
            continue
        finally:
            sys.settrace(before)
        break
    assert {"model_dump", "_leave_out"} < {*places} and len(places) < 99


@pytest.mark.parametrize(
    ("schema", "part", "defaults"),
    [
        (CrestSettings, "crest", {"overlap": False, "actors": 0, "memory": False, "augmented": True, "look": 3}),
        (DeltaGradSettings, "replay", {"tolerance": False}),
        (LiptSettings, "pretrain", {"shard_fraction": False, "outer_momentum": 0.0}),
        (SparseSettings, "agent", {"samples": False, "every": 1, "snapshot_every_steps": 0, "look_every_epochs": 4}),
    ],
)
def test_a_stored_file_opens_with_removed_settings_at_their_defaults_only(schema, part, defaults):
    assert load_stored(schema, {part: defaults}) == load_stored(schema, {part: {}})
    with pytest.raises(UserError, match=min(defaults)):
        load_stored(schema, {part: {min(defaults): 0.5}})

"""Every tune space names settings that exist, with values they accept; its file begins with the experiment's name."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from raypkg.cluster.session import LOOPBACK
from raypkg.cluster.trials import draw_settings
from raypkg.core.config import load_settings, parse_toml, to_toml
from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment
from raypkg.data import load_data
from raypkg.experiments import experiment, settings_of
from raypkg.experiments.resolve import check_names
from raypkg.methods.sparse.settings import SparseSettings
from raypkg.studies.driver import varied
from raypkg.studies.start import SPACES as FOLDER
from raypkg.studies.start import check_space, open_space, read_space
from raypkg.studies.tables import METRICS, open_table, shipped_files

N = 45_000  # training samples
SPACES = sorted((Path(__file__).parents[1] / "tune_spaces").glob("*.py"))


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_a_space_is_allowed_and_draws_valid_settings(file):
    schema, space = settings_of(experiment[file.stem.partition("_")[0]]), read_space(file.read_text(), str(file))
    assert METRICS[space.metric].mode == space.mode

    check_space(space, lambda values: check_names(load_settings(schema, {}, values)))
    for seed in range(20):
        trial = load_settings(schema, {}, draw_settings(space.domains, np.random.default_rng(seed)))
        check_names(trial)
        trial.check(N, load_data("digits"))


def test_optional_parts_can_be_switched_off_by_a_choice(tmp_path):
    text = """
from ray import tune
METRIC, MODE = "accuracy", "max"
def space():
    return {"growth": tune.choice(["random", False]), "agent": tune.choice([True, False])}
"""
    space = read_space(text, "mine.py")
    base = load_settings(SparseSettings, {}, {"density": 0.1, "agent.gamma": 0.5})
    check_space(space, lambda values: check_names(varied(base, values)))
    trials = [varied(base, draw_settings(space.domains, np.random.default_rng(seed))) for seed in range(20)]
    assert {trial.growth and trial.growth.name for trial in trials} == {"random", None}
    assert {trial.agent is None for trial in trials} == {True, False}
    for trial in trials:
        assert load_settings(SparseSettings, parse_toml(to_toml(trial), "config.toml")) == trial


def test_every_experiment_that_trains_can_be_swept():
    for name, entry in experiment.entries.items():
        if issubclass(settings_of(entry), Experiment):
            assert open_space(name if name in shipped_files(FOLDER) else "train").domains


def test_a_space_or_table_of_the_working_folder_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (shipped,) = (file for file in SPACES if file.stem == "crest")
    # In this clone, or in the installed package.
    assert shipped_files(FOLDER)["crest"].read_text() == shipped.read_text()
    (tmp_path / "tune_spaces").mkdir()
    (tmp_path / "tune_spaces" / "crest.py").touch()
    assert shipped_files(FOLDER)["crest"] == Path("tune_spaces/crest.py")
    (tmp_path / "tune_spaces/tables").mkdir()
    (tmp_path / "tune_spaces/tables/crest.py").touch()
    with pytest.raises(UserError, match=r"table 'tune_spaces/tables/crest.py' defines no function table"):
        open_table("crest")


def test_ray_is_confined_before_a_space_imports_it():
    code = "from raypkg.studies.start import open_space; open_space('crest')"
    environment = {name: value for name, value in os.environ.items() if name != LOOPBACK}
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert "Ray was imported before effray" not in ended.stderr

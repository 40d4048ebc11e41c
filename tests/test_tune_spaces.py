"""Every tune space names settings that exist, with values they accept; its file begins with the experiment's name."""

from pathlib import Path

import numpy as np
import pytest

from raypkg.cluster.trials import draw_settings
from raypkg.core.config import load_settings
from raypkg.core.settings import Experiment
from raypkg.experiments import check_names, experiment, settings_of
from raypkg.sweeps.spaces import check_space, find_space, read_space
from raypkg.sweeps.sweep_folder import METRICS

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
        trial.check(N)


def test_every_experiment_that_trains_has_a_space():
    training = {name for name, entry in experiment.entries.items() if issubclass(settings_of(entry), Experiment)}
    assert training <= {file.stem for file in SPACES}


def test_a_space_of_the_working_folder_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_space("crest").resolve() == SPACES[0].resolve()
    (tmp_path / "tune_spaces").mkdir()
    (tmp_path / "tune_spaces" / "crest.py").touch()
    assert find_space("crest") == Path("tune_spaces/crest.py")

"""Every tune space names settings that exist, draws values they accept, and names the experiment by its file."""

import importlib.util
from pathlib import Path

import pytest

from raypkg.core.config import load
from raypkg.experiments import experiment, settings_of

SPACES = sorted((Path(__file__).parents[1] / "tune_spaces").glob("*.py"))


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_a_space_draws_valid_settings(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    schema = settings_of(experiment[file.stem])
    assert module.MODE in ("min", "max")
    for _ in range(20):
        load(schema, None, {name: domain.sample() for name, domain in module.space().items()})

"""`effray tune` as a user types it, up to the start of Ray: every mistake is refused in one line before that."""

import importlib.util
import json

import numpy as np
import pytest
from ray import tune

from raypkg.cluster.trials import Proposals, candidates, constants, draw_settings, grid, optuna
from raypkg.core.errors import UserError
from raypkg.methods.crest.settings import CrestSettings
from raypkg.methods.sparse.settings import SparseSettings
from raypkg.studies.driver import longest_of
from raypkg.studies.start import Space, trials_of
from raypkg.studies.study import Order, Study, Trial, create_study

SPACE = """
from ray import tune

METRIC, MODE = {metric!r}, {mode!r}


def space():
    return {{{space}}}
"""


@pytest.fixture
def space(tmp_path):
    """Return a function that writes a space file in the working folder."""

    def write(space, metric="accuracy", mode="max"):
        (tmp_path / "mine.py").write_text(SPACE.format(space=space, metric=metric, mode=mode))

    return write


@pytest.fixture
def wrong(refusal, tmp_path, monkeypatch):
    """Return a function that runs a sweep which must be refused in one line, without Ray or a folder."""
    import ray

    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))

    def wrong(arguments):
        line = refusal(f"tune {arguments}")
        assert not (tmp_path / "runs").exists()
        return line

    return wrong


CHOICE = "'crest.b': tune.choice([1, 2])"


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("'crset.tau': 0.1", "", "unknown setting 'crset', did you mean 'crest'?"),
        ("'crest.h': tune.uniform(0, 1)", "", "crest.h = 0: input should be greater than 0"),
        ("'train.optimizer': tune.choice(['sgd', 'adam'])", "", "train.optimizer 'adam', did you mean 'adamw'?"),
        (
            "'cluster.workers': tune.choice([0, 2])",
            "",
            "cluster.workers does not alter the result and cannot be",
        ),
        ("'crest.tau': 0.1", "", "space: nothing is left to vary: every setting in it is given or constant"),
        (CHOICE, "--set crest.b=3", "space: nothing is left to vary"),
        ("'model': tune.choice(['mlp', 'linear'])", "--set model.name=mlp", "space: nothing is left to vary"),
        ("1: tune.choice([1])", "", "space 'mine.py': domains.1.[key] = 1: input should be a valid string"),
        ("'dataset.validation': tune.grid_search([0])", "", "trial 0: metric accuracy is measured on held-out samples"),
        ("'seed': tune.choice([*range(10_001)])", "", "seed has 10,001 values, of which 10,000 can be tried"),
        (CHOICE, "--search grid --samples 3", "--samples 3: a grid has as many trials"),
        ("'seed': tune.randint(0, 10**9)", "--search grid", "1,000,000,000 combinations, at most 10,000"),
    ],
)
def test_a_space_is_held_against_the_settings_and_the_request(wrong, space, content, arguments, message):
    space(content)
    assert message in wrong(f"crest --space mine.py {arguments}")


def test_a_space_that_lacks_a_name_is_refused(wrong, space, tmp_path):
    space(CHOICE, mode="most")
    assert "unknown mode 'most'" in wrong("crest --space mine.py")
    (tmp_path / "mine.py").write_text("def space(): return {'crest.tau': 1}")
    assert "space 'mine.py' defines no METRIC" in wrong("crest --space mine.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("crset", "unknown experiment to tune 'crset', did you mean 'crest'?"),
        ("crest --space crset", "unknown space 'crset', did you mean 'crest'?"),
        ("crest --time-budget 0", "--time-budget '0': give seconds"),
        ("crest --samples 0", "'--samples': 0 is not in the range 1<=x<=10000"),
        ("crest --samples 10001", "'--samples': 10001 is not in the range"),
        ("crest --concurrent 0", "'--concurrent': 0 is not in the range x>=1"),
        ("crest --metric acuracy", "unknown metric 'acuracy', did you mean 'accuracy'?"),
        ("crest --metric test_accuracy", "known only at the end of a trial, so --scheduler asha could not act on it"),
        ("crest --scheduler ahsa", "unknown scheduler 'ahsa', did you mean 'asha'?"),
        ("crest --search grid", "--search grid: crest.tau is drawn from a continuous range"),
        ("crest --resume none --samples 3", "--resume none keeps what was asked for: --samples cannot change"),
        ("crest --resume none --name other", "--resume none keeps what was asked for: --name cannot change"),
        ("deltagrad --dataset.augment crop", "trial 0: dataset.augment = crop: DeltaGrad replays exact"),
        ("train --train.evaluate_every_epochs 0", "accuracy would never be measured: train.evaluate_every_epochs = 0"),
        ("train --train.epochs 4 --train.evaluate_every_epochs 5", "train.evaluate_every_epochs = 5 of 4"),
        ("train --train.lr 0.1 --train.batch_size 9 --train.weight_decay 0", "nothing is left to vary"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(wrong, arguments, message):
    assert message in wrong(arguments)


def test_draws_follow_from_the_seed_and_grids_have_every_combination():
    space = {"a": tune.choice([1, 2]), "b": tune.randint(0, 3), "c": tune.grid_search(["x"]), "d": 7}
    assert len(list(grid(space))) == 6 and {"a": 2, "b": 1, "c": "x", "d": 7} in list(grid(space))
    drawn = space | {"e": tune.uniform(0, 1)}
    one, two, other = (draw_settings(drawn, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert one == two != other
    assert {type(value) for value in one.values()} == {int, str, float}
    assert candidates(tune.randint(0, 3)) == [0, 2] and candidates(tune.randn(0, 1)) == []
    assert candidates(tune.qrandint(10, 30, 10)) == [10, 30]
    of_numpy = {"a": tune.grid_search(list(np.arange(2))), "b": np.float64(0.5), "c": tune.choice([np.int64(3)])}
    drawn = draw_settings(of_numpy, np.random.default_rng(0))
    assert json.dumps([*grid(of_numpy), drawn, constants(of_numpy), candidates(of_numpy["c"])])
    few = Space(text="", domains={"crest.b": tune.choice([1, 2, 3]), "train.lr": 0.1}, metric="accuracy", mode="max")
    order = Order(experiment="crest", metric="accuracy", mode="max", samples=10_000, search="random")
    assert sorted(trial["crest.b"] for trial in trials_of(order, few, CrestSettings())) == [1, 2, 3]  # none twice
    with pytest.raises(UserError, match="f is drawn from a continuous range, or one with steps"):
        grid({"f": tune.qrandint(10, 30, 10)})


def test_a_sweep_that_runs_is_not_resumed(refusal, tmp_path):
    order = Order(experiment="crest", metric="accuracy", mode="max", samples=1, varied=["crest.b"])
    text = SPACE.format(metric="accuracy", mode="max", space="'crest.b': tune.choice([1, 2])")
    sweep = create_study(str(tmp_path / "runs"), "s", order, CrestSettings(), text, [Trial(settings={"crest.b": 1})])
    with sweep.storage.locked("it"):
        assert "study 's' is being worked on by another process" in refusal("tune crest --resume s --concurrent 1")
    assert Study(sweep.storage).order.concurrent is None


def test_the_longest_trial_is_as_long_as_its_settings_make_it(monkeypatch):
    settings = SparseSettings(density=0.1)
    domains = {"multiplier": tune.choice([1, 3]), "train.epochs": tune.randint(5, 11), "train.lr": 0.1}
    assert longest_of(settings, domains, []) == 30
    assert longest_of(settings, {"train.lr": 0.1}, [{"train.epochs": 70}]) == 70
    assert longest_of(CrestSettings(), {"train.lr": 0.1}, []) == 4
    together = {"crest.tau": tune.uniform(0.01, 0.1), "crest.h": tune.choice([1.0, 3.0])}  # h alone would do nothing
    assert longest_of(CrestSettings(), together, []) == 4


def test_the_help_lists_the_experiments_that_train(effray):
    text = effray("tune --help")
    assert all(name in text for name in ("crest", "deltagrad", "lipt", "train")) and "Select a coreset" not in text
    assert "--crest.tau" in effray("tune crest --help")


@pytest.mark.skipif(not importlib.util.find_spec("optuna"), reason="an extra")
def test_optuna_is_told_of_what_is_done():
    space = {"train.lr": tune.loguniform(0.01, 1), "train.epochs": 3}
    searcher = optuna(space, "accuracy", "max", 0, [({"train.lr": 0.1, "train.epochs": 3}, 0.9)])
    proposals = Proposals([(0, {"train.lr": 0.5, "train.epochs": 3})], searcher, [2], {"train.epochs": 3})
    assert proposals.suggest("x") == {"number": 0, "values": {"train.lr": 0.5, "train.epochs": 3}}
    proposals.on_trial_complete("x", {"accuracy": 0.5})
    suggested = proposals.suggest("y")
    assert suggested["number"] == 2 and suggested["values"]["train.epochs"] == 3
    assert 0.01 <= suggested["values"]["train.lr"] <= 1
    proposals.on_trial_complete("y", {"accuracy": 0.7})
    assert proposals.suggest("z") == Proposals.FINISHED

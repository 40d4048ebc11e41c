"""Tuning on a coreset: who trains on it, who is run again on all samples, and what is said of it."""

import itertools

import numpy as np
import pytest
import torch

from raypkg.core.config import load_settings
from raypkg.core.settings import Dataset, RunSettings
from raypkg.data.coreset import Coreset
from raypkg.experiments.coreset_files import origin, save_coreset
from raypkg.experiments.samples import open_samples
from raypkg.methods.crest.settings import CrestSettings
from raypkg.runs.agreement import kendall
from raypkg.runs.folder import create as create_run
from raypkg.runs.storage import Storage
from raypkg.studies.proxy import FINALISTS, enlist, selection
from raypkg.studies.standing import ONLY, front, judge_proxy, ranked
from raypkg.studies.sweep_folder import create_sweep

TAUS = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]


@pytest.fixture
def sweep(tmp_path):
    fixed = {ONLY: f"{tmp_path}/train/s-proxy/coreset.parquet"}
    order = {"experiment": "crest", "metric": "accuracy", "mode": "max", "samples": 6, "proxy": 0.1}
    trials = [{"crest.tau": tau} | fixed for tau in TAUS]
    order |= {"varied": ["crest.tau"], "fixed": fixed}
    sweep = create_sweep(str(tmp_path), "s", order, CrestSettings(), "", trials)
    finish(create_run(str(tmp_path), "train", "s-proxy", CrestSettings()), 0.5, 1000)
    return sweep


def finish(run, accuracy, backward):
    run.log({"phase": "train", "main": True, "epoch": 1, "loss": 1.0, "accuracy": accuracy, "backward": backward})
    phases = [{"phase": "train", "backward": backward}]
    bill = {"seconds": 1.0, "elapsed": 1.0, "full_training_backward": backward}
    run.finish({"phases": phases, "samples": 2, "coreset": None} | bill)


def end(sweep, number, accuracy, backward):
    root = sweep.storage.root.rsplit("/", 2)[0]
    finish(create_run(root, "crest", sweep.run_name(number), CrestSettings()), accuracy, backward)
    sweep.ended(number, None)


def test_the_best_are_run_on_all_samples_once_all_have_ended(sweep):
    for number, accuracy in enumerate([0.1, 0.6, 0.3, 0.5, 0.4]):
        end(sweep, number, accuracy, 10)
        assert not enlist(sweep)
    sweep.ended(5, "the loss became nan")
    assert enlist(sweep) and not enlist(sweep)
    finals = [trial["settings"] for trial in sweep.trials[6:]]
    assert finals == [{"crest.tau": tau} for tau in (0.02, 0.04, 0.05, 0.03)] and len(finals) == FINALISTS
    assert [row["proxy"] for row in sweep.results()] == [True] * 6 + [False] * FINALISTS


def test_a_proxy_is_judged_by_the_trials_on_all_samples(sweep):
    for number, accuracy in enumerate([0.1, 0.6, 0.3, 0.5, 0.4, 0.2]):
        end(sweep, number, accuracy, 10)
    assert judge_proxy(sweep, sweep.results()) is None
    enlist(sweep)
    for number, accuracy in enumerate([0.9, 0.7, 0.8, 0.6], 6):
        end(sweep, number, accuracy, 100)
    results = sweep.results()
    judged = judge_proxy(sweep, results)
    assert judged["trials"] == 4 and judged["kendall"] == pytest.approx(2 / 3)
    assert (judged["backward"], judged["backward_without"]) == (1000 + 6 * 10 + 4 * 100, 600)
    assert [row["trial"] for row in ranked(results, "accuracy", "max")][:5] == [6, 8, 7, 9, 1]
    assert front(results, "accuracy", "max") == [6]


def test_kendall_counts_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 20), rng.integers(0, 6, 20)
    pairs = list(itertools.combinations(range(20), 2))
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in pairs]
    untied = np.sqrt(sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs))
    assert kendall(a, b) == pytest.approx(sum(x * y for x, y in signs) / untied)
    assert kendall(a, a) == pytest.approx(1) and kendall(a, -a) == pytest.approx(-1)
    assert np.isnan(kendall(np.ones(3), np.arange(3)))


def test_a_data_set_can_be_narrowed_to_a_coreset_with_the_same_held_out_samples(tmp_path):
    whole = open_samples(RunSettings())
    picked = whole.train_indices[torch.tensor([9, 3, 50])]
    save_coreset(Storage(str(tmp_path)), Coreset.uniform(picked), whole.data.train, origin(CrestSettings()))
    narrowed = open_samples(RunSettings(dataset=Dataset(only=f"{tmp_path}/coreset.parquet")))
    assert narrowed.train_indices.tolist() == sorted(picked.tolist())
    assert torch.equal(narrowed.held_out, whole.held_out)


def test_the_coreset_is_selected_with_the_model_that_is_tuned():
    settings = load_settings(CrestSettings, None, {"model": "mlp", "seed": 3, "dataset.validation": 0.2})
    chosen = selection(settings, 0.3, "craig", 0)
    assert (chosen.model.name, chosen.seed, chosen.dataset.validation) == ("mlp", 3, 0.2)
    assert (chosen.select.method, chosen.select.fraction, chosen.cluster.workers) == ("craig", 0.3, 0)

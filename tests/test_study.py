"""A study's folder and results: every trial once, the best first, fronts, means over seeds, and stored studies."""

import json
import math
import os
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ray.tune.result import DONE

from ray_runs import effray
from raypkg.cli.runs import folded
from raypkg.cluster.trials import TrialProcess
from raypkg.core.config import load_settings, read_toml
from raypkg.core.errors import UserError
from raypkg.experiments.train import TrainSettings
from raypkg.methods.crest.settings import CrestSettings
from raypkg.runs.catalog import remove, runs_of
from raypkg.runs.folder import RunFolder
from raypkg.runs.folder import create as create_run
from raypkg.runs.storage import Storage
from raypkg.studies import plots
from raypkg.studies.driver import run_trial
from raypkg.studies.outcomes import estimated, front, paired_difference
from raypkg.studies.show import conclude, show_study, write_page
from raypkg.studies.start import resume_study
from raypkg.studies.study import Order, Record, Study, Trial, TrialRun, as_table, create_study, find_study, ranked
from raypkg.studies.tables import current_function

ORDER = Order(experiment="crest", metric="accuracy", mode="max", samples=4)
TAUS = [0.01, 0.02, 0.03, 0.04]


def trial(number, accuracy, backward, state="done"):
    return {"trial": number, "state": state, "accuracy": accuracy, "backward": backward}


def sweep_of(root, trials, order=ORDER, settings=None):
    records = [Trial(settings=values) for values in trials]
    return create_study(str(root), "s", order, settings or CrestSettings(), "", records)


def finish(study, number, accuracies, *, backward=None):
    """Make a trial's run, done if ``backward`` is given."""
    values = {"crest.tau": TAUS[number], "cluster.workers": 0, "train.lr": 0.3}
    run = create_run(study.root, "crest", study.run_name(number), load_settings(CrestSettings, None, values))
    for epoch, accuracy in enumerate(accuracies, 1):
        row = {"phase": "train", "main": True, "epoch": epoch, "loss": 1 / epoch}
        run.log(row | {"accuracy": accuracy, "backward": 10 * epoch})
    run.flush()
    if backward:
        phases = [{"phase": "train", "backward": backward}, {"phase": "select", "backward": 1}]
        summary = {"phases": phases, "seconds": 2.5, "test_accuracy": 0.5, "coreset": 1, "samples": 2}
        run.finish(summary | {"test_loss": 0.1, "full_training_backward": 100, "elapsed": 3.0})


@pytest.fixture
def sweep(tmp_path):
    study = sweep_of(tmp_path, [{"crest.tau": tau} for tau in TAUS])
    finish(study, 0, [0.5, 0.8], backward=100)
    finish(study, 1, [0.6, 0.9], backward=200)
    finish(study, 2, [0.3])
    for number in range(3):
        study.started(number, {"crest.tau": TAUS[number]})
    study.ended(0, None)
    study.ended(2, None)
    return study


# Trials


def test_run_folders_decide_the_states_of_trials(sweep):
    assert [sweep.state(number) for number in range(4)] == ["done", "done", "stopped", "unfinished"]
    assert sweep.waiting() == [(3, {"crest.tau": 0.04})]
    assert not sweep.further()
    sweep.ended(3, "the loss became nan")
    assert sweep.state(3) == "failed" and [number for number, _ in sweep.waiting()] == [3]
    for number in (0, 2):
        sweep.run_storage(number).delete_folder("")
    assert [sweep.state(number) for number in range(4)] == ["unfinished", "done", "unfinished", "failed"]


def test_a_done_run_is_a_done_trial_even_if_its_process_or_its_driver_died_before_the_record(sweep):
    assert [trial.ended for trial in sweep.trials] == ["done", None, "stopped", None]
    assert sweep.ended(1, "its process died") == "done" and sweep.trials[1].error is None
    sweep.trials[1].ended = None
    sweep.settle()
    assert [trial.ended for trial in sweep.trials] == ["done", "done", "stopped", None]


def reported(tmp_path, **values):
    """Return the rows that a trial reports, and its study."""
    short = {"model": "linear", "train.epochs": 3, "train.evaluate_every_epochs": 1}
    order = ORDER.model_copy(update={"experiment": "train", "samples": 1})
    study = sweep_of(tmp_path, [values], order, load_settings(TrainSettings, None, short))
    rows = []
    last = run_trial(0, values, rows.append, root=study.storage.root, workers=0)
    return [*rows, last], study


def test_a_trial_reports_its_last_epoch_when_it_is_complete(tmp_path):
    rows, study = reported(tmp_path)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["accuracy"] == TrialRun(study.run(0)).figures()["accuracy"]
    again = []
    assert run_trial(0, {}, again.append, root=study.storage.root, workers=0) == rows[-1]
    assert not again


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train.lr": 1e30}, "the loss became nan in epoch 1"),
        ({"model": f"{__name__}:broken"}, "RuntimeError: no such luck"),
    ],
)
def test_a_failed_trial_reports_the_worst_value(tmp_path, values, message):
    rows, _ = reported(tmp_path, **values)
    assert rows[-1]["accuracy"] < -1e9 and rows[-1]["epoch"] >= 1 and message in rows[-1]["error"]


def broken(shape, num_classes):
    raise RuntimeError("no such luck")


def test_a_foreign_run_with_a_trials_name_stays_as_it_is(sweep):
    other = create_run(sweep.root, "crest", sweep.run_name(3), load_settings(CrestSettings, None, {"seed": 77}))
    before = other.storage.read("config.toml")
    row = run_trial(3, {"crest.tau": TAUS[3]}, lambda row: None, root=sweep.storage.root, workers=0)
    assert "has other settings than the trial of that name: rename it, or delete it" in row["error"]
    assert other.storage.read("config.toml") == before


def process_of(trial, home="/"):
    process = TrialProcess.__new__(TrialProcess)  # without Ray
    process.setup({"number": 0, "values": {}}, trial, str(home))
    return process


@pytest.mark.parametrize(
    ("error", "message"), [(ValueError("a bug"), "a bug"), (SystemExit(0), r"ended itself by SystemExit\(0\)")]
)
def test_a_stopped_trial_closes_its_files_and_an_exception_reaches_the_reader(tmp_path, monkeypatch, error, message):
    monkeypatch.chdir(tmp_path)
    closed = []

    def trial(number, values, tell):
        try:
            tell({"epoch": 1})
            raise error
        finally:
            closed.append(True)

    process = process_of(trial)
    assert process.step() == {"epoch": 1, DONE: False} and not closed  # it waits
    process.cleanup()
    assert closed and not process._thread.is_alive()
    process = process_of(trial)
    process.step()
    with pytest.raises((ValueError, RuntimeError), match=message):
        process.step()


def test_a_trial_finds_the_process_as_the_first_one_did(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHANGED", "no")
    found = []

    def trial(number, values, tell):
        mine = os.environ.get("MINE"), os.environ["CHANGED"], os.getcwd(), sys.path[0]
        found.append((*mine, torch.rand(1).item(), torch.get_num_threads(), torch.get_default_dtype()))
        os.environ.update(MINE="1", CHANGED="yes")
        os.chdir("/")
        sys.path.insert(0, "mine")
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_default_dtype(torch.float16)
        return {"epoch": 1}

    process = process_of(trial, tmp_path)
    assert process.step() == {"epoch": 1, DONE: True}
    assert process.reset_config({"number": 1, "values": {}})
    process.step()
    assert process.reset_config({"number": 2, "values": {}})  # restores this process, too
    process.cleanup()
    assert found[1] == found[0] and torch.get_default_dtype() == torch.float32


def test_trials_that_a_searcher_will_propose_are_further_ones(tmp_path):
    study = sweep_of(tmp_path, [], ORDER.model_copy(update={"search": "optuna"}))
    study.started(1, {"crest.tau": 0.5})
    assert study.further() == [0, 2, 3]
    assert [row["trial"] for row in study.results(study.runs())] == [1]
    assert find_study(str(tmp_path), "s").trials == study.trials


# Figures


def test_figures_are_the_last_of_the_main_training_and_the_cost_of_all_phases(sweep):
    run = sweep.run(0)
    run.log({"phase": "pretrain", "model": 0, "epoch": 7, "accuracy": 0.1})
    expected = {"epochs": 2, "accuracy": 0.8, "loss": 0.5, "backward": 101, "seconds": 2.5}
    assert TrialRun(run).figures() == expected | {"test_accuracy": 0.5, "test_loss": 0.1}
    assert TrialRun(run).curve("accuracy") == [(1, 0.5), (2, 0.8)]
    assert TrialRun(sweep.run(2)).figures()["backward"] == 10
    sweep.run(2).finish_phase("pretrain", {"costs": [{"phase": "pretrain", "backward": 500}], "elapsed": 1.0})
    assert TrialRun(sweep.run(2)).figures()["backward"] == 510
    sweep.run(2).finish_phase("train", {"costs": [{"phase": "train", "backward": 10}], "elapsed": 1.0, "main": True})
    assert TrialRun(sweep.run(2)).figures()["backward"] == 510  # of an interrupted run, which rows have counted


def test_done_trials_come_first_then_the_cheapest_of_equal_ones():
    rows = [trial(0, 0.9, 20), trial(1, None, None, "failed"), trial(2, 0.95, 5, "stopped"), trial(3, 0.9, 10)]
    assert [row["trial"] for row in ranked(rows, "accuracy", "max")] == [3, 0, 2, 1]
    assert [row["trial"] for row in ranked(rows, "accuracy", "min")][:2] == [3, 0]


def test_nothing_dominates_the_front():
    rng = np.random.default_rng(0)
    points = dict(enumerate(zip(rng.integers(0, 50, 60), rng.random(60), strict=True)))
    for mode, sign in (("max", 1), ("min", -1)):
        dominated = {
            one
            for one, (cost, value) in points.items()
            for other in points.values()
            if other[0] <= cost and sign * other[1] >= sign * value and other != (cost, value)
        }
        assert set(front(points, mode)) == set(range(60)) - dominated


def test_a_difference_is_taken_seed_by_seed():
    values = {0: 91.0, 1: 94.0, 2: 90.0, 7: 50.0}  # the last has no partner
    baseline = {0: 90.0, 1: 92.0, 2: 87.0, 3: 10.0}
    found = paired_difference(values, baseline)
    assert found.mean == pytest.approx(2.0)
    # Differences 1, 2 and 3 have s = 1; the printed quantile for two degrees of freedom is 4.302653.
    assert found.spread == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    of_one = paired_difference({0: 2.0}, {0: 1.0})
    assert of_one.mean == 1.0 and math.isnan(of_one.spread) and math.isnan(estimated([3.0]).spread)
    assert paired_difference({0: 2.0}, {1: 1.0}) is None is estimated([])


# Results


def test_results_have_every_trial_once_and_the_best_settings_run_again(sweep):
    conclude(sweep)
    table = pq.read_table(sweep.storage.local / "results.parquet").to_pylist()
    assert [(row["trial"], row["state"], row["accuracy"], row["crest.tau"]) for row in table] == [
        (0, "done", 0.8, 0.01),
        (1, "done", 0.9, 0.02),
        (2, "stopped", 0.3, 0.03),
        (3, "unfinished", None, 0.04),
    ]
    best = read_toml(sweep.storage.local / "best.toml")
    assert "cluster" not in best and "track" not in best
    expected = load_settings(CrestSettings, None, {"crest.tau": 0.02, "train.lr": 0.3})
    assert load_settings(CrestSettings, best) == expected
    assert sorted(sweep.storage.list("plots")) == ["curves.png", "pareto.png", "settings.png"]
    page = sweep.storage.read("report.html").decode()
    assert page.count("data:image/png;base64,") == 3 and "tune/s/best.toml" in page
    text = sweep.storage.read("table.md").decode()
    assert "| *1 | done |" in text and "| 2 | stopped |" in text  # which has no place on the Pareto front


def test_pages_open_with_the_finding_and_the_picture_link_each_other_and_stay_small(sweep, monkeypatch):
    monkeypatch.setattr("raypkg.studies.show.MOST", 1)
    write_page(RunFolder(sweep.storage))
    page, trial = sweep.storage.read("report.html").decode(), sweep.run_storage(1).read("report.html").decode()
    order = ['class="finding">best: s-001, accuracy 0.9', 'href="plots/settings.png"', 'href="../../crest/s-001/']
    assert [*map(page.index, order)] == sorted(map(page.index, order)) and "data:" not in page
    assert 'href="../../tune/s/report.html">trial of s<' in trial
    assert trial.index('"finding">test accuracy') < trial.index("<table>")


def test_the_list_counts_stopped_trials_and_names_no_deleted_one(sweep, tmp_path):
    def line():
        (only,) = folded(str(tmp_path), runs_of(str(tmp_path), ["crest"]))
        return only.name.rpartition("best ")[2], only.backward, only.seconds

    conclude(sweep)
    assert line() == ("s-001", 101 + 201 + 10, 5.0)
    remove(sweep.run_storage(1))
    assert line() == ("s-000", 101 + 10, 2.5)


def test_a_trial_that_ends_while_the_sweep_is_shown_has_no_results_yet(sweep, monkeypatch, capsys):
    monkeypatch.setattr(Study, "state", lambda *_: "done")  # read after the folders of the runs
    for number in range(2):
        remove(sweep.run_storage(number))
    show_study(sweep)
    assert "best: s-002, accuracy 0.3" in capsys.readouterr().out


def test_values_of_several_types_or_beyond_64_bits_make_a_column_of_texts(sweep):
    rows = [{"trial": 0, "seed": 2**70, "x": "auto"}, {"trial": 1, "seed": 1, "x": 3}]
    stored = as_table(rows).to_pylist()
    assert stored == [{"trial": 0, "seed": str(2**70), "x": "auto"}, {"trial": 1, "seed": "1", "x": "3"}]


@pytest.mark.parametrize("count", [0, 1, 8])
def test_plots_take_few_trials_choices_ranges_and_failures(tmp_path, count):
    choices = ({"train.lr": 10.0 ** -(n % 4 + 1), "train.optimizer": ["sgd", "adamw"][n % 2]} for n in range(count))
    rows = [trial(n, n / 10, 100 - n, "stopped" if n % 2 else "done") | chosen for n, chosen in enumerate(choices)]
    names = ["train.lr", "train.optimizer"] if rows else []
    failed = [trial(9, None, None, "failed") | {"train.lr": 0.1, "train.optimizer": "sgd"}] if rows else []
    for more in ([], failed):
        plots.against_settings(rows + more, names, "accuracy", tmp_path / "settings.png")
        points = {row["trial"]: (row["backward"], row["accuracy"]) for row in rows if row["state"] == "done"}
        plots.pareto(points, front(points, "max"), "accuracy", tmp_path / "pareto.png")
        plots.learning_curves({"a": [], "b": [(1, 0.5)]} if rows else {}, "accuracy", None, tmp_path / "curves.png")
    assert len(list(tmp_path.glob("*.png"))) == 3


# Folders


def test_names_are_not_taken_twice(sweep, tmp_path):
    with pytest.raises(UserError, match="did you mean 's'"):
        find_study(str(tmp_path), "ss")
    with pytest.raises(UserError, match="sweep 's' exists"):
        sweep_of(tmp_path, [])
    sweep.storage.delete_folder("")
    with pytest.raises(UserError, match=r"run 's-000' exists in .*, as the sweep or a trial would be called"):
        sweep_of(tmp_path, [])
    create_run(str(tmp_path), "crest", "one", CrestSettings())
    with pytest.raises(UserError, match="run 'one' exists"):
        create_study(str(tmp_path), "one", ORDER, CrestSettings(), "", [])


def test_a_study_appears_with_all_of_its_files_or_not_at_all(tmp_path, monkeypatch):
    write = Record.write

    def meanwhile(storage, *rest):
        monkeypatch.setattr(Record, "write", write)
        assert not Storage(str(tmp_path)).list("tune")
        sweep_of(tmp_path, [{}] * 4)  # another process is faster
        write(storage, *rest)

    monkeypatch.setattr(Record, "write", meanwhile)
    with pytest.raises(UserError, match=r"sweep 's' exists in .* or continue with --resume s"):
        sweep_of(tmp_path, [{"crest.tau": tau} for tau in TAUS])
    assert [path.name for path in (tmp_path / "tune").iterdir()] == ["s"]
    assert find_study(str(tmp_path), "s").trials == [Trial(settings={})] * 4


@pytest.mark.parametrize("more", [[], ["--resume", "s"]])
def test_credentials_do_not_reach_ray_tune(capsys, more):
    effray("tune", "train", *more, "--root", "s3://KEY:SECRET@bucket/runs", code=2)
    assert "--root has credentials in it, which Ray Tune would keep" in capsys.readouterr().err


# Studies that earlier versions stored, as they wrote them


def stored(root, order, trials, space=None):
    """Write a study's folder by hand, and return it."""
    folder = root / "tune" / "old"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('seed = 0\n[dataset]\nname = "digits"\n[train]\nepochs = 2\n')
    whole = [{"settings": values, "ended": None, "error": None, **more} for values, more in trials]
    (folder / "sweep.json").write_text(json.dumps({"order": order, "trials": whole}))
    if space:
        (folder / "space.py").write_text(space)
    return find_study(str(root), "old")


SPACE = "METRIC, MODE = 'accuracy', 'max'\ndef space(): return {'select.method': {'grid_search': ['el2n', 'craig']}}"


def test_a_sweep_of_an_earlier_version_is_shown_and_resumed(tmp_path, capsys, monkeypatch):
    order = {
        "experiment": "lipt", "space": "mine.py", "samples": 2, "metric": "accuracy", "mode": "max",
        "scheduler": "fifo", "search": "grid", "concurrent": None, "time_budget": None,
        "proxy": 0.5, "proxy_method": "craig", "varied": ["select.method"], "fixed": {},
    }  # fmt: skip
    study = stored(tmp_path, order, [({"select.method": "el2n"}, {}), ({"select.method": "craig"}, {})], SPACE)
    assert study.waiting() == [(0, {"select.rule": "el2n"}), (1, {"select.rule": "craig"})]
    effray("show", "old", "--root", tmp_path)
    assert f"resume with: effray tune lipt --resume old --root {tmp_path}" in capsys.readouterr().out
    resumed = []
    monkeypatch.setattr("raypkg.cluster.session.connect", lambda *_, **__: None)
    monkeypatch.setattr("raypkg.cluster.session.trial_size", lambda *_: None)
    monkeypatch.setattr("raypkg.studies.driver.Driver.run", lambda driver: resumed.append([*driver.domains]))
    resume_study("old", "effray tune lipt", {"concurrent": 1}, {}, str(tmp_path))
    assert resumed == [["select.rule"]]
    assert find_study(str(tmp_path), "old").order.concurrent == 1


def test_a_comparison_of_an_earlier_version_is_shown_and_resumed(tmp_path, capsys):
    after = "raypkg.sweeps.deletions:delete_some"
    assert current_function(after) == current_function("raypkg.studies.deletions:delete_some")
    table = {
        "title": "Deletions", "experiment": "deltagrad", "baseline": "m 2",
        "rows": {"m 2": {"replay.pairs": 2}}, "cases": {"all": {}}, "shared": {"train.epochs": 2}, "seeds": [0],
        "metric": "test_accuracy", "goals": {}, "columns": {"ratio": "ratio"}, "paper": {}, "after": {"m 2": after},
    }  # fmt: skip
    order = {
        "experiment": "deltagrad", "space": None, "samples": 1, "metric": "test_accuracy", "mode": "max",
        "scheduler": "fifo", "search": None, "concurrent": None, "time_budget": None, "proxy": None,
        "proxy_method": None, "varied": [], "fixed": {}, "asked": "deltagrad", "scale": "small", "table": table,
    }  # fmt: skip
    stored(tmp_path, order, [({"replay.pairs": 2, "seed": 0}, {"after": after})])
    effray("show", "old", "--root", tmp_path)
    assert "old: 1 trials are left" in capsys.readouterr().out
    effray("compare", "deltagrad", "--resume", "old", "--root", tmp_path, "--cluster.workers", "0")
    out = capsys.readouterr().out
    assert "1 trials of deltagrad to run, 0 done" in out and "old-000 (m 2; seed 0) done: test_accuracy" in out
    (row,) = pq.read_table(tmp_path / "tune/old/results.parquet").to_pylist()
    assert row["state"] == "done" and row["ratio"] > 0

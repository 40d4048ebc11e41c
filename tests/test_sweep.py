"""A sweep's folder and results: every trial once, the best first, the front, and settings that can be run again."""

import contextlib
import json
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
from raypkg.studies.order import Order, filled
from raypkg.studies.pages import sweep_page
from raypkg.studies.spaces import Space
from raypkg.studies.standing import front, ranked
from raypkg.studies.sweep import resume_sweep
from raypkg.studies.sweep_folder import create_sweep, find_sweep, is_sweep

from raypkg.cli import main
from raypkg.cluster.trials import Paced
from raypkg.core.config import load_settings, read_toml
from raypkg.core.errors import UserError
from raypkg.experiments import experiment
from raypkg.experiments.train import TrainSettings
from raypkg.methods.crest.settings import CrestSettings
from raypkg.methods.lipt.settings import LiptSettings
from raypkg.runs.folder import create as create_run
from raypkg.runs.show import terminal
from raypkg.runs.storage import Storage
from raypkg.studies import plots as sweep_plots
from raypkg.studies.figures import TrialRun
from raypkg.studies.show import conclude, show_sweep
from raypkg.studies.tables import Table
from raypkg.studies.trial import run_trial

ORDER = {"experiment": "crest", "metric": "accuracy", "mode": "max", "samples": 4}
TAUS = [0.01, 0.02, 0.03, 0.04]


def trial(number, accuracy, backward, state="done"):
    return {"trial": number, "state": state, "accuracy": accuracy, "backward": backward}


def measured(run):
    return TrialRun(run).figures()


def finish(sweep, number, accuracies, *, backward=None):
    """Make a trial's run, done if ``backward`` is given."""
    values = {"crest.tau": TAUS[number], "cluster.workers": 0, "train.lr": 0.3}
    settings = load_settings(CrestSettings, None, values)
    run = create_run(sweep.storage.root.rsplit("/", 2)[0], "crest", sweep.run_name(number), settings)
    for epoch, accuracy in enumerate(accuracies, 1):
        run.log(
            {
                "phase": "train",
                "main": True,
                "epoch": epoch,
                "loss": 1 / epoch,
                "accuracy": accuracy,
                "backward": 10 * epoch,
            }
        )
    run.flush()
    if backward:
        phases = [{"phase": "train", "backward": backward}, {"phase": "select", "backward": 1}]
        summary = {"phases": phases, "seconds": 2.5, "test_accuracy": 0.5, "coreset": 1, "samples": 2}
        run.finish(summary | {"test_loss": 0.1, "full_training_backward": 100, "elapsed": 3.0})


@pytest.fixture
def sweep(tmp_path):
    sweep = create_sweep(str(tmp_path), "s", ORDER, CrestSettings(), "", [{"crest.tau": tau} for tau in TAUS])
    finish(sweep, 0, [0.5, 0.8], backward=100)
    finish(sweep, 1, [0.6, 0.9], backward=200)
    finish(sweep, 2, [0.3])
    for number in range(3):
        sweep.started(number, {"crest.tau": TAUS[number]})
    sweep.ended(0, None)
    sweep.ended(2, None)
    return sweep


def test_a_trial_is_what_its_run_folder_says(sweep):
    assert [sweep.state(number) for number in range(4)] == ["done", "done", "stopped", "unfinished"]
    assert sweep.waiting() == [(3, {"crest.tau": 0.04})]
    assert not sweep.further()


def told(tmp_path, **values):
    """Return what a trial tells whoever compares it."""
    short = {"model": "linear", "train.epochs": 3, "train.evaluate_every_epochs": 1}
    settings = load_settings(TrainSettings, None, short)
    order = {"experiment": "train", "metric": "accuracy", "mode": "max", "samples": 1}
    sweep = create_sweep(str(tmp_path), "t", order, settings, "", [values])
    rows = []
    last = run_trial(0, values, rows.append, root=sweep.storage.root, workers=0)
    return [*rows, last], sweep


def test_a_trial_tells_of_its_last_epoch_when_it_is_complete(tmp_path):
    rows, sweep = told(tmp_path)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["accuracy"] == measured(sweep.run(0))["accuracy"]
    again = []
    assert run_trial(0, {}, again.append, root=sweep.storage.root, workers=0) == rows[-1]
    assert not again


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train.lr": 1e30}, "the loss became nan in epoch 1"),
        ({"model": f"{__name__}:broken"}, "RuntimeError: no such luck"),
    ],
)
def test_a_trial_that_fails_tells_the_worst(tmp_path, values, message):
    rows, _ = told(tmp_path, **values)
    assert rows[-1]["accuracy"] < -1e9 and rows[-1]["epoch"] >= 1 and message in rows[-1]["error"]


def broken(shape, num_classes):
    raise RuntimeError("no such luck")


def test_a_stopped_trial_closes_its_files_where_it_reports():
    closed = []

    def trial(tell):
        try:
            tell({"epoch": 1})
        finally:
            closed.append(True)
        return {"epoch": 2}

    paced = Paced(trial)
    assert paced.advance() == {"epoch": 1} and not paced.ended
    assert not closed  # it waits
    assert paced.stop(10) and closed


def test_a_trial_around_ray_train_closes_its_files_in_the_thread_that_reports():
    closed = []
    over = threading.Event()

    def trial(tell):
        def report():
            with contextlib.suppress(SystemExit):
                tell({"epoch": 1})
            closed.append(True)

        reporter = threading.Thread(target=report)
        reporter.start()
        over.wait(10)  # for workers, which nobody tells

    paced = Paced(trial)
    paced.advance()
    assert not paced.stop(10) and closed
    over.set()


def test_a_trial_that_was_not_begun_is_stopped_at_once():
    assert Paced(lambda tell: pytest.fail("it began")).stop(10)


@pytest.mark.parametrize(
    ("error", "message"), [(ValueError("a bug"), "a bug"), (SystemExit(0), r"ended itself by SystemExit\(0\)")]
)
def test_what_a_trial_raises_is_raised_to_whom_asks_for_its_rows(error, message):
    def trial(tell):
        raise error

    with pytest.raises((ValueError, RuntimeError), match=message):
        Paced(trial).advance()


def test_a_stopped_trial_has_paid_for_its_earlier_phases_too(sweep):
    assert measured(sweep.run(2))["backward"] == 10
    sweep.run(2).finish_phase("pretrain", {"costs": [{"backward": 500}], "elapsed": 1.0})
    assert measured(sweep.run(2))["backward"] == 510


def test_a_failed_trial_is_to_be_run_again(sweep):
    sweep.ended(3, "the loss became nan")
    assert sweep.state(3) == "failed" and [number for number, _ in sweep.waiting()] == [3]


def test_the_trials_that_a_searcher_will_think_of_are_further_ones(tmp_path):
    sweep = create_sweep(str(tmp_path), "s", ORDER, CrestSettings(), "", [])
    sweep.started(1, {"crest.tau": 0.5})
    assert sweep.further() == [0, 2, 3]
    assert [row["trial"] for row in sweep.results()] == [1]
    assert find_sweep(str(tmp_path), "s").trials == sweep.trials


def test_figures_are_the_last_of_the_main_training(sweep):
    run = sweep.run(0)
    run.log({"phase": "pretrain", "model": 0, "epoch": 7, "accuracy": 0.1})
    expected = {"epochs": 2, "accuracy": 0.8, "loss": 0.5, "backward": 101, "seconds": 2.5}
    assert measured(run) == expected | {"test_accuracy": 0.5, "test_loss": 0.1}
    assert TrialRun(run).curve("accuracy") == [(1, 0.5), (2, 0.8)]


def test_the_table_has_every_trial_once_and_the_best_settings_run_again(sweep):
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
    assert load_settings(CrestSettings, best) == load_settings(
        CrestSettings, None, {"crest.tau": 0.02, "train.lr": 0.3}
    )
    assert sorted(sweep.storage.list("plots")) == ["curves.png", "parallel.png", "pareto.png", "settings.png"]


@pytest.mark.parametrize("write", [conclude, lambda sweep: show_sweep(sweep, terminal())])
def test_the_metrics_of_a_trial_are_read_once(sweep, monkeypatch, write):
    read = []
    whole = Storage.read_table
    monkeypatch.setattr(
        Storage, "read_table", lambda storage, name: (read.append(storage.root), whole(storage, name))[1]
    )
    write(sweep)
    assert [root.rpartition("/")[2] for root in read] == ["s-000", "s-001", "s-002", "s-003"]


def test_counts_have_separators_and_settings_are_as_they_are_typed(tmp_path, capsys):
    order = ORDER | {"metric": "backward", "mode": "min"}
    sweep = create_sweep(str(tmp_path), "s", order, CrestSettings(), "", [{"train.batch_size": 1024}])
    finish(sweep, 0, [0.5], backward=30_175)
    show_sweep(sweep, terminal())
    shown = capsys.readouterr().out
    assert "best: s-000, backward 30,176" in shown
    for text in (shown, sweep_page(sweep)):
        assert text.count("30,176") >= 2 and "30176" not in text
        assert "1024" in text and "1,024" not in text


@pytest.mark.parametrize(
    ("rows", "title"),
    [
        ([trial(0, 0.5, 10)], "1 of 1 trial is on the Pareto front"),
        ([trial(0, 0.5, 10), trial(1, 0.4, 20)], "1 of 2 trials is on the Pareto front"),
        ([trial(0, 0.5, 10), trial(1, 0.6, 20)], "2 of 2 trials are on the Pareto front"),
    ],
)
def test_the_front_is_counted_in_grammar(tmp_path, monkeypatch, rows, title):
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda axes, title: titles.append(title))
    sweep_plots.pareto(rows, front(rows, "accuracy", "max"), "accuracy", tmp_path / "pareto.png")
    assert titles == [title]


def test_values_of_several_types_make_a_column(sweep):
    sweep.started(0, {"crest.tau": 0.01, "train.precision": "auto"})
    sweep.started(1, {"crest.tau": 0.02, "train.precision": 3})
    conclude(sweep)
    assert pq.read_table(sweep.storage.local / "results.parquet")["train.precision"].to_pylist()[:2] == ["auto", "3"]


def test_done_trials_come_first_then_the_cheapest_of_equal_ones():
    rows = [trial(0, 0.9, 20), trial(1, None, None, "failed"), trial(2, 0.95, 5, "stopped"), trial(3, 0.9, 10)]
    assert [row["trial"] for row in ranked(rows, "accuracy", "max")] == [3, 0, 2, 1]
    assert [row["trial"] for row in ranked(rows, "accuracy", "min")][:2] == [3, 0]


def test_the_front_is_what_nothing_dominates():
    rng = np.random.default_rng(0)
    rows = [trial(n, a, b) for n, (a, b) in enumerate(zip(rng.random(60), rng.integers(0, 50, 60), strict=True))]
    for mode, sign in (("max", 1), ("min", -1)):
        dominated = {
            row["trial"]
            for row in rows
            for other in rows
            if other["backward"] <= row["backward"]
            and sign * other["accuracy"] >= sign * row["accuracy"]
            and (other["backward"], other["accuracy"]) != (row["backward"], row["accuracy"])
        }
        assert set(front(rows, "accuracy", mode)) == set(range(60)) - dominated


def test_a_stopped_trial_is_not_on_the_front():
    assert front([trial(0, 0.9, 1, "stopped"), trial(1, 0.5, 9)], "accuracy", "max") == [1]


@pytest.mark.parametrize("name", ["", "a/b", ".."])
def test_a_name_that_is_a_path_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="1 to 100 letters"):
        create_sweep(str(tmp_path), name, ORDER, CrestSettings(), "", [])


def test_names_are_not_taken_twice(sweep, tmp_path):
    with pytest.raises(UserError, match="sweep 's' exists"):
        create_sweep(str(tmp_path), "s", ORDER, CrestSettings(), "", [])
    sweep.storage.delete_folder("")
    with pytest.raises(UserError, match="run 's-000' exists"):
        create_sweep(str(tmp_path), "s", ORDER, CrestSettings(), "", [])


def test_a_sweep_and_a_run_of_one_name_could_not_be_told_apart(tmp_path):
    create_run(str(tmp_path), "crest", "s", CrestSettings())
    with pytest.raises(UserError, match=r"run 's' exists in .*, as the sweep or a trial would be called"):
        create_sweep(str(tmp_path), "s", ORDER, CrestSettings(), "", [])


def test_a_sweep_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        create_sweep(str(tmp_path), "s", ORDER, CrestSettings(), "", [{"crest.tau": object()}])
    assert not (tmp_path / "tune/s").exists()


WHOLE = json.dumps({"order": ORDER, "trials": []})
NOT_RECORDS = [
    "[]",
    "3",
    "null",
    '{"order": 3, "trials": []}',
    WHOLE.replace('"crest"', "3"),
    WHOLE.replace("4", '"four"'),
    WHOLE.replace('"trials": []', '"trials": {}'),
    WHOLE.replace('"trials": []', '"trials": [3]'),
    WHOLE.replace('"trials": []', '"trials": [{}]'),
    WHOLE.replace('"trials": []', '"trials": [{"settings": 3, "ended": null, "error": null}]'),
]


@pytest.mark.parametrize(
    "record",
    [None, "{}", '{"order": {}, "trials": []}', '{"order": {"experiment": "crest"}}', *NOT_RECORDS],
)
def test_half_a_sweep_is_said_to_be_one(sweep, tmp_path, record):
    sweep.storage.delete("sweep.json")
    if record:
        sweep.storage.write("sweep.json", record.encode())
    with pytest.raises(
        UserError,
        match=r"its sweep.json is missing or damaged, so delete|sweep.json is corrupt: it holds null",
    ):
        find_sweep(str(tmp_path), "s")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.toml", None, "config.toml' is missing or empty: what was asked for is lost"),
        ("config.toml", b" ", "config.toml' is missing or empty: what was asked for is lost"),
        ("config.toml", b"\xff", "config.toml' is not valid TOML: 'utf-8' codec"),
        ("config.toml", b"seed =", "config.toml' is not valid TOML: Invalid value"),
        ("config.toml", b"seed = " + b"[" * 5000, "config.toml' is not valid TOML: its brackets are nested"),
        ("space.py", None, "space.py is missing or empty: what was asked for is lost"),
        ("space.py", b"\xff", "space.py is corrupt: 'utf-8' codec"),
        ("sweep.json", b"{", "sweep.json is corrupt: "),
        ("sweep.json", b"[]", "holds no whole sweep: its sweep.json is missing or damaged"),
    ],
)
def test_a_sweep_whose_files_were_damaged_does_not_go_on(sweep, tmp_path, file, content, message):
    sweep.storage.write("space.py", b"def space(): return {}")
    sweep.storage.delete(file)
    if content is not None:
        sweep.storage.write(file, content)
    entry = experiment["crest"]
    with pytest.raises(UserError, match=message) as refused:
        resume_sweep(entry, Order("crest"), "s", {}, str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("option", ["samples", "concurrent"])
@pytest.mark.parametrize("count", [-1, 0, 10_001, 99_999_999_999, 10**40])
def test_how_many_trials_there_can_be(option, count):
    with pytest.raises(UserError, match=rf"--{option} {str(count)[:5]}.*: at least 1 and at most 10,000"):
        filled(Order("train", **{option: count}), Space("", {}, "accuracy", "max"))


@pytest.mark.parametrize("count", [-1, 0])
def test_a_sweep_that_would_run_no_trial_at_once_is_not_resumed_and_stays_as_it_was(sweep, tmp_path, count):
    before = sweep.storage.read("sweep.json")
    with pytest.raises(UserError, match=f"--concurrent {count}: at least 1"):
        resume_sweep(experiment["crest"], Order("crest", concurrent=count), "s", {}, str(tmp_path))
    assert sweep.storage.read("sweep.json") == before


def test_a_value_beyond_64_bits_is_in_the_table_as_text(sweep):
    sweep.conclude([{"trial": 0, "seed": 2**70}], None)
    assert sweep.storage.read_table("results.parquet").to_pylist() == [{"trial": 0, "seed": str(2**70)}]


def test_how_a_sweep_goes_on_may_change(sweep, tmp_path):
    sweep.change({"concurrent": 3}, load_settings(CrestSettings, sweep.config, {"cluster.workers": 2}))
    changed = find_sweep(str(tmp_path), "s")
    assert changed.order == ORDER | {"concurrent": 3} and changed.config["cluster"]["workers"] == 2


def test_an_unknown_sweep_is_refused_with_the_nearest(sweep, tmp_path):
    assert is_sweep(sweep.storage)
    with pytest.raises(UserError, match="did you mean 's'"):
        find_sweep(str(tmp_path), "ss")


@pytest.mark.parametrize("rows", [[], [trial(0, None, None, "failed")], [trial(0, 0.5, 10)]], ids=["0", "failed", "1"])
def test_few_trials_are_drawn_as_well(tmp_path, rows):
    rows = [row | {"crest.tau": 0.1, "train.optimizer": "sgd"} for row in rows]
    names = ["crest.tau", "train.optimizer"] if rows else []
    sweep_plots.against_settings(rows, names, "accuracy", tmp_path / "settings.png")
    sweep_plots.parallel(rows, names, "accuracy", "max", tmp_path / "parallel.png")
    sweep_plots.learning_curves({"a": [], "b": [(1, 0.5)]} if rows else {}, "accuracy", None, tmp_path / "curves.png")
    sweep_plots.pareto(rows, front(rows, "accuracy", "max"), "accuracy", tmp_path / "pareto.png")
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_plots_take_choices_ranges_and_stopped_trials(tmp_path):
    rows = [
        trial(n, n / 10, 100 - n, "stopped" if n % 2 else "done")
        | {"train.lr": 10.0 ** -(n % 4 + 1), "train.optimizer": ["sgd", "adamw"][n % 2], "train.nesterov": n % 3 == 0}
        for n in range(8)
    ]
    names = ["train.lr", "train.optimizer", "train.nesterov"]
    sweep_plots.against_settings(rows, names, "accuracy", tmp_path / "settings.png")
    sweep_plots.parallel(rows, names, "accuracy", "min", tmp_path / "parallel.png")
    sweep_plots.pareto(rows, front(rows, "accuracy", "max"), "accuracy", tmp_path / "pareto.png")
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_a_run_of_a_trials_name_that_is_none_of_the_sweeps_stays_as_it_is(sweep):
    settings = load_settings(CrestSettings, None, {"seed": 77})
    other = create_run(sweep.root, "crest", sweep.run_name(3), settings)
    before = other.storage.read("config.toml")
    row = run_trial(3, {"crest.tau": TAUS[3]}, lambda row: None, root=sweep.storage.root, workers=0)
    assert "has other settings than the trial of that name: rename it, or delete it" in row["error"]
    assert other.storage.read("config.toml") == before


@pytest.mark.parametrize("more", [[], ["--resume", "s"]])
def test_credentials_do_not_reach_ray_tune(capsys, more):
    with pytest.raises(SystemExit):
        main(["tune", "train", *more, "--root", "s3://KEY:SECRET@bucket/runs"])
    assert "--root has credentials in it, which Ray Tune would keep" in capsys.readouterr().err


def test_a_study_recorded_with_former_names_opens_by_current_ones(tmp_path):
    order = {"experiment": "lipt", "metric": "accuracy", "mode": "max", "samples": 1, "varied": ["select.method"]}
    sweep = create_sweep(str(tmp_path), "s", order, LiptSettings(), "", [{"select.method": "craig"}])
    assert sweep.trials[0]["settings"] == {"select.rule": "craig"} and sweep.order["varied"] == ["select.rule"]
    rows = {"old": {"select.method": "random"}}
    table = Table.of({"title": "t", "experiment": "lipt", "baseline": "old", "rows": rows})
    assert table.rows == {"old": {"select.rule": "random"}}

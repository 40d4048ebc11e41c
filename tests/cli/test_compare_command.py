"""`effray compare` and `effray report` as a user types them, without Ray: the trials that run, and the results."""

import importlib
import json
import re
import sys
from pathlib import Path

import click
import pyarrow.parquet as pq
import pytest

from raypkg import load_study
from raypkg.core.errors import UserError
from raypkg.runs.folder import LOG, RunFolder
from raypkg.studies import driver as trials
from raypkg.studies.driver import run_trial
from raypkg.studies.outcomes import Outcomes
from raypkg.studies.start import _opened
from raypkg.studies.study import find_study
from raypkg.studies.tables import stored_table

TABLE = """
from raypkg.studies.tables import Table

def table(scale):
    return Table(
        title="Shares of <digits>",
        experiment="train",
        baseline="all",
        shared={"model": "linear", "train.epochs": 2 if scale == "small" else 3},
        rows={
            "all": {},
            "<b>half</b>": {"select.rule": "random", "select.fraction": 0.5},
            "tenth": {"select.rule": "random", "select.fraction": 0.1},
        },
        seeds=(0, 1),
        goals={"accuracy": [0.2]},
        columns={"kept": "coreset"},
        paper={"all": {"all": "99.9"}},
    )
"""
ALONE = "--cluster.workers 0"
MINE = f"compare mine.py {ALONE} --name m"


@pytest.fixture
def mine(tmp_path):
    """Write a table into the working folder, and return a function that changes it."""
    file = tmp_path / "mine.py"
    file.write_text(TABLE)

    def change(before, after):
        assert before in TABLE
        file.write_text(TABLE.replace(before, after))

    return change


@pytest.fixture
def started(monkeypatch):
    """Return the numbers of the trials that are trained, as they come."""
    numbers = []
    original = trials._train

    def train(study, number, *rest):
        numbers.append(number)
        return original(study, number, *rest)

    monkeypatch.setattr(trials, "_train", train)
    return numbers


def outcomes(name="m"):
    study = find_study("runs", name)
    return Outcomes(study, stored_table(study.order.table))


def test_finished_trials_never_run_again_and_requests_add_up(effray, mine, started):
    told = effray(f"{MINE} --rows tenth --seeds 0")
    assert started == [0, 1]  # the baseline is added
    assert "2 trials of train to run, 0 done" in told and "<b>half</b>" not in told
    effray(f"{MINE} --rows tenth --seeds 0")
    assert started == [0, 1]
    effray(f"{MINE} --rows all --seeds 1")
    effray("compare mine.py --resume m")
    assert started == [0, 1, 2]
    (case,) = outcomes().cases
    assert {line.row: line.seeds for line in case.lines} == {"all": (0, 1), "tenth": (0,)}
    assert "3 trials of train to run, 3 done" in effray(MINE)
    trials = load_study("m")
    assert trials.num_rows == 6 and trials["test_accuracy"].null_count == 0
    record = json.loads(effray("show m --format json"))
    assert [row["test_accuracy"] for row in record["trials"]] == trials["test_accuracy"].to_pylist()
    rows = [line.split(" & ")[0] for line in effray("show m --format latex").splitlines() if " & " in line]
    assert rows == ["row", r"\textbf{all}", "tenth", "<b>half</b>"]


def test_a_killed_comparison_runs_what_is_missing_and_ends_as_usual(call, effray, mine, started, monkeypatch):
    finish = RunFolder.finish

    def die(run, summary):
        if run.name == "m-001":
            raise KeyboardInterrupt
        finish(run, summary)

    monkeypatch.setattr(RunFolder, "finish", die)
    ended = call(MINE)
    assert ended.code == 2
    assert "interrupted, 5 trials left; resume with: effray compare mine.py --resume m" in ended.err
    assert started == [0, 1]
    monkeypatch.setattr(RunFolder, "finish", finish)
    effray("compare mine.py --resume m")
    assert started == [0, 1, 1, 2, 3, 4, 5]
    effray(f"compare mine.py {ALONE} --name straight")
    for case in zip(outcomes("m").cases, outcomes("straight").cases, strict=True):
        one, other = ({line.row: (line.value, line.difference) for line in each.lines} for each in case)
        assert one == other


def test_costs_exclude_evaluation_goals_have_their_cost_and_a_column_may_be_a_speed_up_over_a_row(effray, mine):
    mine('"kept": "coreset"', '"kept": "coreset", "speed-up": "<b>half</b> / work"')
    effray(f"{MINE} --rows tenth --seeds 0")  # the row that others are divided by is added
    (case,) = outcomes().cases
    everyone, half, tenth = case.lines
    summary = json.loads(Path("runs/train/m-000/summary.json").read_text())
    train = next(phase for phase in summary["phases"] if phase["phase"] == "train")
    assert everyone.costs["backward"].mean == train["backward"] == 2 * 1295
    assert everyone.costs["forward"].mean == train["forward"]
    assert everyone.costs["work"].mean == (train["forward"] + 2 * train["backward"]) / 3
    goal = everyone.goals["accuracy", 0.2]
    assert (goal.seeds, goal.of) == (1, 1) and goal.backward.mean == 1295  # after the first of two epochs
    assert tenth.columns["kept"].mean == 130 and everyone.columns["kept"] is None
    assert tenth.on_front  # nothing is cheaper
    assert half.columns["speed-up"].mean == 1 > everyone.columns["speed-up"].mean
    speed_up = half.costs["work"].mean / tenth.costs["work"].mean
    assert tenth.columns["speed-up"].mean == speed_up == pytest.approx(648 / 130)


def test_pages_say_the_same_and_fetch_nothing(effray, mine, tmp_path):
    told = effray(f"{MINE} --seeds 0")
    folder = tmp_path / "runs/tune/m"
    page = (folder / "report.html").read_text()
    assert effray("report m").strip() == str(folder / "report.html")
    linked = (folder / "report.html").read_text()
    assert re.subn(r'<a href="../../train/m-00./report.html">(m-00.)</a>', r"\1", linked) == (page, 3)
    of_a_trial = (tmp_path / "runs/train/m-000/report.html").read_text()
    assert "http" not in of_a_trial and of_a_trial.count("data:image/png;base64,") == 1
    assert "train.batch_size" in of_a_trial and "test accuracy" in of_a_trial
    markdown = (folder / "table.md").read_text()
    assert "&lt;b&gt;half&lt;/b&gt;" in page and "<b>half</b>" not in page
    assert "Shares of &lt;digits&gt;" in page
    assert "http" not in page and "<script" not in page and page.count("data:image/png;base64,") == 2
    assert "| **all** |" in markdown and "99.9" in markdown and "published" in told
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert [row["row"] for row in rows] == ["all", "<b>half</b>", "tenth"]
    assert {(row["seed"], row["state"]) for row in rows} == {(0, "done")}
    assert rows[0]["test_accuracy"] and rows[0]["backward"] == 2590


def test_a_papers_figure_is_left_out_where_an_option_changes_a_setting(effray, mine):
    told = effray(f"{MINE} --rows tenth --seeds 0")
    assert "published" in told and "99.9" in told
    told = effray(f"compare mine.py {ALONE} --name other --rows tenth --seeds 0 --train.lr 0.2")
    assert "published" not in told and "99.9" not in told
    assert "99.9" not in effray("show other")
    # The defaults name the digits, but the paper's case does not.
    mine("paper={", "cases={'all': {'dataset.name': 'cifar10'}}, paper={")
    told = effray(f"compare mine.py {ALONE} --name digits --rows tenth --seeds 0 --dataset digits")
    assert "published" not in told and "99.9" not in told


def test_a_failed_trial_is_reported_and_retried(effray, mine, monkeypatch):
    def broken(*_):
        raise UserError("the disk is full")

    original = trials._train
    monkeypatch.setattr(trials, "_train", broken)
    told = effray(f"{MINE} --rows tenth --seeds 0")
    assert "m-000 failed: the disk is full" in told
    assert "2 of 2 trials are not done; resume with: effray compare mine.py --resume m" in told
    monkeypatch.setattr(trials, "_train", original)
    assert " failed: " not in effray(f"{MINE} --rows tenth --seeds 0")


def test_every_row_takes_its_best_rate_by_held_out_samples(effray, refusal, mine, started):
    mine('"<b>half</b>": {', '"<b>half</b>": {"train.lr": 0.05, ')
    told = effray(f"{MINE} --rates 0.001,0.1 --seeds 0,1")
    assert sorted(started) == list(range(2 * (2 + 1 + 2)))  # a row's own rate stays
    found = outcomes()
    (case,) = found.cases
    for place, line in enumerate(case.lines):
        figures = {}
        for rate in (0.001, 0.1):
            identities = [found.table.identity("all", line.row, seed, rate) for seed in (0, 1)]
            figures[rate] = [found.runs[found.study.numbers()[identity]].figures() for identity in identities]
        best = max(figures, key=lambda rate: sum(each["accuracy"] for each in figures[rate]))
        assert line.value.mean == pytest.approx(sum(each["test_accuracy"] for each in figures[best]) / 2)
        assert line.rate == (0.05 if place == 1 else best)
    assert case.lines[0].rate == 0.1 and "rate" in told and "99.9" not in told
    assert "train.lr is what the rows or cases" in refusal(f"{MINE} --rates 0.1 --train.lr 0.2")
    assert "rates.0 = 'x': input should be a valid number" in refusal(f"{MINE} --rates x")
    assert "dataset.validation = 0 holds out none" in refusal(f"{MINE} --rates 0.1 --dataset.validation 0 --name n")


def test_a_following_function_runs_once_and_gives_a_column(effray, mine, tmp_path, monkeypatch):
    (tmp_path / "following.py").write_text(
        "calls = []\n\ndef size(run):\n    calls.append(run.name)\n    return {'letters': len(run.name)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine('columns={"kept": "coreset"}', 'columns={"letters": "letters"}, after={"tenth": "following:size"}')
    effray(f"{MINE} --rows tenth --seeds 0")
    (case,) = outcomes().cases
    assert [line.columns["letters"] and line.columns["letters"].mean for line in case.lines] == [None, 5.0]
    study = find_study("runs", "m")
    run_trial(1, study.trials[1].settings, lambda row: None, root=study.storage.root, workers=0)
    assert importlib.import_module("following").calls == ["m-001"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compare crset", "unknown table 'crset', did you mean 'crest'?"),
        ("compare mine.py --rows tnth", "unknown row 'tnth', did you mean 'tenth'?"),
        ("compare mine.py --seeds 0,x", "--seeds '0,x': integers, such as 0,1,2 or 0-9"),
        ("compare mine.py --seeds 0-999999", "--seeds '0-999999': 1,000,000 seeds, at most 10,000 trials"),
        ("compare mine.py --seeds 0-4999", "15,000 trials: at most 10,000"),
        ("compare mine.py --seeds 3-1", "seeds = "),
        ("compare mine.py --goal accuracy", "goals.accuracy.0 = '': input should be a valid number"),
        ("compare mine.py --select.fraction 0.3", "select.fraction is what the rows or cases of the table differ in"),
        ("compare mine.py --resume m --rows tenth", "--resume m keeps what was asked for: --rows cannot change"),
        ("compare mine.py --resume m --dry-run", "--dry-run cannot change"),
        ("compare mine.py --rate 1000", "--rate 1000 does nothing without --dry-run"),
    ],
)
def test_a_mistake_is_refused_in_one_line_before_anything_runs(refusal, mine, started, arguments, message):
    assert message in refusal(f"{arguments} {ALONE}")
    assert not started


def test_one_name_is_not_two_comparisons(effray, refusal, mine):
    effray(f"{MINE} --rows tenth --seeds 0")
    told = refusal(f"{MINE} --rows tenth --seeds 0 --train.epochs 5")
    assert "comparison 'm' was begun with train.epochs = 2, now it is 5: give another --name" in told
    assert "'m' was not begun by effray tune train: resume it with effray compare mine.py --resume m" in refusal(
        "tune train --resume m"
    )
    assert "keeps what was asked for: train.epochs cannot change" in refusal(
        "compare mine.py --resume m --train.epochs 5"
    )


def test_results_of_changed_data_are_not_mixed(effray, refusal, mine, tmp_path, started):
    rows = tmp_path / "rows.csv"
    rows.write_text("a,label\n" + "".join(f"{n},{n % 2}\n" for n in range(400)))
    command = f"compare mine.py {ALONE} --name m --rows tenth --dataset table:rows.csv"
    effray(f"{command} --seeds 0")
    rows.write_text(rows.read_text().replace("7,1", "7,0"))
    _opened.cache_clear()  # of this process
    for again in (f"{command} --seeds 0,1", "compare mine.py --resume m"):
        told = refusal(again)
        assert "the data of m-000 are not those that it began with: give another --name, or delete 'm'" in told
    assert started == [0, 1]
    (tmp_path / "runs/tune/m/sweep.json").write_text(record := without_digests(tmp_path / "runs/tune/m/sweep.json"))
    assert '"digest"' not in record and "the data of m-000 are not" in refusal("compare mine.py --resume m")


def without_digests(file):
    """Return a record as earlier versions stored it."""
    stored = json.loads(file.read_text())
    for part in (stored, *stored["trials"]):
        del part["digest"]
    return json.dumps(stored)


def test_verdicts_are_at_equal_work_and_may_be_expected(effray, call, mine):
    mine("seeds=(0, 1),", 'seeds=(0, 1),\n        as_baseline=("<b>half</b>",),')
    told = effray(f"{MINE} --rows tenth --expect unknown")
    assert "verdict at" in told and "<b>half</b>" in told  # the baseline's other rows are added
    (verdict,) = json.loads(Path("runs/tune/m/verdicts.json").read_text())
    assert (verdict["row"], verdict["verdict"], verdict["seeds"]) == ("tenth", "unknown", 2)
    assert "unknown" in Path("runs/tune/m/table.md").read_text()
    ended = call(f"{MINE} --rows tenth --expect paid")
    assert ended.code == 1 and "expected paid: 1 of 1 verdicts are others" in ended.out


def test_a_dry_run_counts_trials_and_samples(effray, mine, tmp_path):
    told = effray(f"{MINE} --dry-run --rate 1000")
    assert "tenth: 2 trials of 260 samples backward" in told
    assert "6 trials, 8,292 samples backward, 0.0 hours at 1000 a second" in told
    assert not (tmp_path / "runs").exists()


def test_more_than_a_hundred_trials_start_only_after_their_hours_are_known(call, tmp_path, monkeypatch):
    asked = call("effray compare selection --dataset digits")
    assert asked.code == 2 and "there is no terminal to ask on whether to start 1824 trials: --yes" in asked.err
    assert re.fullmatch(
        r"1824 trials, 35,311,320 samples backward, about [1-9]\.\d hours on one processor core \(.*\)\n", asked.out
    )
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(click, "confirm", lambda question: question != "start 1824 trials?")
    assert call("effray compare selection --dataset digits").code == 0
    own = call("effray compare crest --rows crest --cases 'mlp*' --seeds 0 --dataset digits --dry-run").out
    assert own.endswith("5 trials, 62,228 samples backward, about 0.0 hours on one processor core\n")
    assert not (tmp_path / "runs").exists()


def test_deltagrads_rows_delete_a_thousandth_a_hundredth_and_one_sample_after_another(effray):
    rows = "'*1 %' --rows 'deltagrad; one after another'"
    effray(f"compare deltagrad {ALONE} --name d --rows {rows} --seeds 0 --train.epochs 4")
    deleted = {}
    study = find_study("runs", "d")
    for line in outcomes("d").cases[0].lines:
        number = study.numbers()[stored_table(study.order.table).identity("all", line.row, 0)]
        entries = map(json.loads, study.run_storage(number).read(LOG).splitlines())
        deleted[line.row] = [entry["deleted"] for entry in entries if entry["kind"] == "change"]
    assert deleted == {
        "deltagrad": [1],
        "deltagrad; one after another": [1] * 10,
        "deltagrad; 1 %": [13],
        "full batch; 1 %": [13],
        "full batch; T0 20; j0 5; 1 %": [13],
    }


def test_a_trial_has_the_verdict_on_its_row(effray, mine):
    effray(MINE.replace(" --name m", " --scale paper"))
    study = find_study("runs", "mine-digits-paper")  # of table, data and scale
    assert study.config["train"]["epochs"] == 3
    effray(MINE)
    assert "against" in effray("show m")
    listed = effray("list tune")
    assert "m: 6 of 6 trials done" in listed and "compare mine.py" in listed
    effray("export m-002 --out tenth")
    assert re.search(r"row 'tenth' of comparison 'm': [a-z ]+ over 2 seeds", Path("tenth/README.md").read_text())

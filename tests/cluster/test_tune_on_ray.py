"""Sweeps on Ray: both ways of running a trial, and trials, workers and drivers that die."""

import json
import signal
import subprocess
import time

import pyarrow.parquet as pq
import pytest

from ray_runs import driver, effray, wait_for
from wandb_records import records

KINDS = ("run", "history", "summary", "exit")
SPACE = """
from ray import tune
METRIC, MODE = "accuracy", "max"
def space():
    return {"train.lr": tune.loguniform(0.02, 0.2), "train.weight_decay": tune.choice([1e-4, 1e-3])}
"""
TINY = ["--model", "mlp", "--train.precision", "float32", "--train.epochs", "4", "--train.batch_size", "64"]


@pytest.fixture
def space(tmp_path):
    (tmp_path / "space.py").write_text(SPACE)
    return str(tmp_path / "space.py")


def results(root, name="s"):
    return pq.read_table(root / "tune" / name / "results.parquet").to_pylist()


def started(root):
    """Return when each run began, by its name."""
    files = (root / "train").glob("*/environment.json")
    return {file.parent.name: json.loads(file.read_text())["started"] for file in files}


def grid(tmp_path, *rates):
    """Return the options of a grid of learning rates."""
    space = SPACE.partition("def")[0] + f"def space():\n    return {{'train.lr': tune.grid_search({[*rates]})}}\n"
    (tmp_path / "grid.py").write_text(space)
    return ["--root", tmp_path, "--name", "s", "--space", tmp_path / "grid.py", "--search", "grid", *TINY]


def check_wandb(root, rows):
    """Assert that each W&B run was closed and has its trial's name, group, settings, epochs and, if done, summary."""
    for row in rows:
        (file,) = (root / "train" / row["run"]).glob("wandb/offline-run-*/*.wandb")
        written = [*records(file)]
        kinds = {kind: [getattr(r, kind) for r in written if r.WhichOneof("record_type") == kind] for kind in KINDS}
        ((run,), (ended,)) = kinds["run"], kinds["exit"]
        assert (run.display_name, run.run_group, ended.exit_code) == (row["run"], "s", 0)
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert settings["train"]["lr"] == row["train.lr"]
        logged = [{"/".join(i.nested_key) or i.key: i.value_json for i in each.item} for each in kinds["history"]]
        epochs = [int(items["train/epoch"]) for items in logged if "train/epoch" in items]
        assert epochs == [*range(1, row["epochs"] + 1)]
        summaries = [{"/".join(i.nested_key) or i.key for i in each.update} for each in kinds["summary"]]
        done = row["state"] == "done"
        assert any("test_accuracy" in names for names in summaries) == done
        assert any(name.startswith("plots/") for items in logged for name in items) == done


def test_a_sweep_of_single_processes(ray, tmp_path, space, capsys):
    options = ["--root", tmp_path, "--name", "s", "--space", space, "--samples", "6", "--track", "wandb", *TINY]
    effray("tune", "train", *options)
    rows = results(tmp_path)
    assert [row["trial"] for row in rows] == list(range(6))
    assert {row["state"] for row in rows} <= {"done", "stopped"}
    assert all(row["epochs"] == 4 for row in rows if row["state"] == "done")
    out = capsys.readouterr().out
    assert f"wandb sync {tmp_path}/train/s-*/wandb/offline-run-*" in out
    check_wandb(tmp_path, rows)
    best = next(row for row in rows if f"best: {row['run']}" in out)
    assert best["accuracy"] == max(row["accuracy"] for row in rows if row["state"] == "done")
    effray("show", "--root", tmp_path, "s-000")
    effray("show", "--root", tmp_path, "s")
    assert f"best: {best['run']}" in capsys.readouterr().out
    config = tmp_path / "tune/s/best.toml"
    effray("train", "--root", tmp_path, "--config", config, "--name", "again", "--cluster.workers", "0")
    again = json.loads((tmp_path / "train/again/summary.json").read_text())
    assert again["test_accuracy"] == best["test_accuracy"]  # the trial was the same run


def test_a_stopped_trial_of_several_workers_closes_its_files(ray, tmp_path):
    effray("tune", "train", *grid(tmp_path, 0.2, 1e-5, 1e-6), "--cluster.workers", "2", "--track", "wandb")
    rows = results(tmp_path)
    assert rows[0]["state"] == "done" and "stopped" in {row["state"] for row in rows[1:]}
    check_wandb(tmp_path, rows)


def test_lipt_with_as_many_workers_a_trial_as_there_are_cpus(ray, tmp_path):
    """Whoever else keeps a CPU to itself hangs the sweep."""
    small = ["--pretrain.models", "4", "--pretrain.epochs", "2", "--pretrain.batch_size", "32"]
    options = ["--root", tmp_path, "--name", "s", "--samples", "2", "--cluster.workers", "3", "--scheduler", "fifo"]
    (tmp_path / "space.py").write_text(SPACE.replace("train.lr", "pretrain.lr"))
    effray("tune", "lipt", *options, *TINY, *small, "--space", tmp_path / "space.py")
    assert [row["state"] for row in results(tmp_path)] == ["done", "done"]
    for number in range(2):
        summary = json.loads((tmp_path / f"lipt/s-{number:03d}/summary.json").read_text())
        assert summary["workers"] == 3


def test_requests_that_cannot_be_met_are_refused(ray, tmp_path, space, capsys):
    options = ["tune", "train", "--root", tmp_path, "--name", "s", "--space", space, *TINY]
    effray(*options, "--cluster.workers", "4", code=2)
    assert "4 workers of 1 CPU and 0 GPU do not fit the cluster" in capsys.readouterr().err
    effray(*options, "--cluster.workers", "2", "--concurrent", "2", code=2)
    assert "--concurrent 2: the cluster has room for 1 trials of 2 processes" in capsys.readouterr().err
    assert not list(tmp_path.glob("t*/*"))


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median"])
def test_a_failing_trial_does_not_disturb_others(ray, tmp_path, scheduler, capsys):
    effray("tune", "train", *grid(tmp_path, 0.1, 1e30, 0.2), "--scheduler", scheduler)
    rows = results(tmp_path)
    assert rows[1]["state"] == "failed" and "the loss became" in rows[1]["error"]
    assert {rows[0]["state"], rows[2]["state"]} <= {"done", "stopped"}
    assert "resume with: effray tune train --resume s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("death", "workers", "trials"),
    [("once", "0", 2), ("once", "2", 2), ("trial", "3", 1)],  # the last while its workers start, whose CPUs are freed
)
def test_a_killed_trial_resumes_from_its_last_epoch(ray, tmp_path, space, death, workers, trials):
    source = ["--dataset", f"sabotage:load_and_kill_{death}", "--set", f"dataset.options.marker={tmp_path}/killed"]
    options = ["--root", tmp_path, "--name", "s", "--space", space, "--samples", trials, "--scheduler", "fifo", *TINY]
    effray("tune", "train", *options, *source, "--cluster.workers", workers)
    assert (tmp_path / "killed").exists()  # somebody did die
    rows = results(tmp_path)
    assert [(row["trial"], row["state"], row["epochs"]) for row in rows] == [(n, "done", 4) for n in range(trials)]


def test_a_killed_driver_is_resumed_and_no_done_trial_runs_twice(ray, tmp_path, space):
    options = ["--root", tmp_path, "--name", "s", "--space", space, "--samples", "5", "--scheduler", "fifo", *TINY]
    with driver("tune", "train", *options, "--train.epochs", "30", stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: len(list(tmp_path.glob("train/*/summary.json"))) >= 2, process)
        process.kill()
    time.sleep(5)  # until its trials are gone as well
    done = {file.parent.name for file in tmp_path.glob("train/*/summary.json")}
    before, written = started(tmp_path), {name: (tmp_path / "train" / name / "summary.json").stat() for name in done}
    assert 2 <= len(done) < 5
    effray("tune", "train", "--root", tmp_path, "--resume", "s")
    assert [(row["trial"], row["state"], row["epochs"]) for row in results(tmp_path)] == [
        (number, "done", 30) for number in range(5)
    ]
    for name in done:
        assert (tmp_path / "train" / name / "summary.json").stat().st_mtime_ns == written[name].st_mtime_ns
    assert before.items() <= started(tmp_path).items()  # those in between went on in their folders


def test_an_interrupt_ends_in_order_and_names_the_command_that_resumes(tmp_path, space):
    options = ["--root", tmp_path, "--name", "s", "--space", space, "--samples", "4", "--scheduler", "fifo", *TINY]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with driver("tune", "train", *options, "--train.epochs", "40", **pipes) as process:
        wait_for(lambda: len(list(tmp_path.glob("train/*/summary.json"))) >= 1, process)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=120)
    assert process.returncode == 2 and "best: s-00" in out
    assert error.splitlines()[-1].startswith("effray: interrupted, ")
    assert f"resume with: effray tune train --resume s --root {tmp_path}" in error
    assert len(results(tmp_path)) == 4


def test_a_time_budget_leaves_the_rest_to_be_resumed(ray, tmp_path, space, capsys):
    options = ["--root", tmp_path, "--name", "s", "--space", space, "--samples", "40", "--time-budget", "12s", *TINY]
    effray("tune", "train", *options, "--scheduler", "fifo")
    assert "of 40 trials are not done; resume with" in capsys.readouterr().out
    assert {"unfinished"} <= {row["state"] for row in results(tmp_path)}

"""CREST, sparse training, DeltaGrad, embedding, `instruct` and tables on Ray: the same result, whoever computes."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from ray_runs import effray, picks, run, same_weights
from run_files import files
from tiny_language import instructions, tiny_language

# CREST

PLAIN = [
    "--model", "mlp", "--train.precision", "float32", "--train.batch_size", "64", "--train.epochs", "10",
    "--budget", "0.3", "--crest.subset", "0.1",
]  # fmt: skip
MODEL = ("--crest.tau", "0.1", "--crest.h", "3")


@pytest.mark.parametrize("preset", ["fast", "each-step"])  # with a local model and without one
def test_two_workers_choose_and_train_as_one_process(ray, tmp_path, preset):
    options = [*PLAIN, "--preset", preset, *(MODEL if preset == "fast" else ())]
    runs = [run(tmp_path, "crest", count, *options, "--cluster.workers", count) for count in ("0", "2")]
    same_weights(*runs, tolerance=1e-4)
    # Of two medoids with equal gain, either may come first: a step's samples are the same.
    by_step = [("update", "ascending"), ("index", "ascending")]
    picks = [pq.read_table(folder / "minibatches.parquet").sort_by(by_step) for folder in runs]
    assert picks[0].equals(picks[1])
    if preset == "fast":
        checks = [pq.read_table(folder / "crest.parquet").to_pandas() for folder in runs]
        assert checks[0].step.equals(checks[1].step)
        assert (checks[0].rho - checks[1].rho).abs().max() <= 1e-3


def test_two_workers_choose_for_a_language_model_as_one_process(ray, tmp_path):
    # By exact gradients: the estimate's difference of two losses magnifies the rounding of weights by 1/2ε.
    model, data = tiny_language(tmp_path / "lm"), instructions(tmp_path, 60)
    options = [
        "--preset", "colm", "--crest.gradient", "exact",
        "--dataset", f"instructions:{data}", "--set", "dataset.options.length=64",
        "--model", f"transformers-lm:{model}", "--train.precision", "float32",
        "--train.batch_size", "6", "--train.epochs", "4", "--budget", "0.5", "--train.lr", "1e-3",
    ]  # fmt: skip
    alone = run(tmp_path, "crest", "alone", *options, "--cluster.workers", "0")
    others = run(tmp_path, "crest", "others", *options, "--cluster.workers", "2")
    same_weights(alone, others, tolerance=1e-6)  # not the picks: some samples are equal, and either may be taken


# Sparse training and AGENT

SPARSE = [
    "--model", "mlp", "--train.precision", "float32", "--train.batch_size", "64", "--train.epochs", "6",
    "--density", "0.2", "--growth", "gradient", "--update_every_steps", "10", "--agent.form", "measured",
]  # fmt: skip


def sparse(root, workers, name="", *options):
    return run(root, "sparse", name or workers, *SPARSE, "--cluster.workers", workers, *options)


def test_two_workers_hold_the_masks_of_one(ray, tmp_path):
    one, two = sparse(tmp_path, "1"), sparse(tmp_path, "2")
    changes = [pq.read_table(folder / "topology.parquet") for folder in (one, two)]
    assert changes[0].equals(changes[1]) and len(changes[0]) > 10
    models = [load_file(folder / "model.safetensors") for folder in (one, two)]
    for name, weight in models[0].items():
        assert (weight != 0).equal(models[1][name] != 0)
    same_weights(one, two, tolerance=1e-4)


def test_two_workers_one_of_them_lost_correct_as_undisturbed_ones_do(ray, tmp_path):
    marker = tmp_path / "killed"
    source = ["--dataset", "sabotage:load_and_kill_once", "--set", f"dataset.options.marker={marker}"]
    whole, robbed = sparse(tmp_path, "2"), sparse(tmp_path, "2", "robbed", *source)
    assert marker.exists()
    steps = [pq.read_table(folder / "correction.parquet") for folder in (whole, robbed)]
    assert max(steps[0]["c"].to_pylist()) > 0.1
    for a, b in zip(steps[0]["c"].to_pylist(), steps[1]["c"].to_pylist(), strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    same_weights(whole, robbed, tolerance=1e-5)


# DeltaGrad

DELTAGRAD = ["--dataset", "libsvm:rows.svm", "--train.epochs", "20", "--train.batch_size", "4096"]
ROWS = 4000  # of which more than 2,048 are asked of the actors at once


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    y, x = rng.integers(0, 3, ROWS), rng.normal(size=(ROWS, 5))
    x[np.arange(ROWS), y] += 1
    lines = (f"{c} " + " ".join(f"{j}:{v:.4f}" for j, v in enumerate(row, 1)) for c, row in zip(y, x, strict=True))
    (tmp_path / "rows.svm").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/deltagrad"


def test_workers_and_actors_change_nothing(ray, folder, capsys):
    for name, workers in {"alone": "0", "two": "2"}.items():
        effray("deltagrad", "train", "--name", name, *DELTAGRAD, "--cluster.workers", workers)
        effray("deltagrad", "delete", name, "--ids", "1,2,3,4,5", "--cluster.workers", workers)
    same_weights(folder / "alone", folder / "two", tolerance=1e-12)
    capsys.readouterr()
    effray("deltagrad", "verify", "two", "--cluster.workers", "2")
    distance = next(line for line in capsys.readouterr().out.splitlines() if "distance of" in line)
    assert float(distance.split()[4]) < 1e-3
    entry = json.loads((folder / "two/log.jsonl").read_text().splitlines()[-1])
    assert (entry["deleted"], entry["steps"]) == (5, 20)


# Features of a frozen model, computed by actors

EMBED = ["--model", "resnet8", "--draws", "2", "--precision", "float32", "--rows-per-part", "100"]


def tables(folder: Path) -> list[bytes]:
    return [(folder / f"{split}.parquet").read_bytes() for split in ("train", "test")]


def test_no_one_and_two_actors_leave_the_same_bytes(ray, tmp_path):
    here, one, two = (run(tmp_path, "embed", count, *EMBED, "--cluster.workers", count) for count in ("0", "1", "2"))
    assert tables(here) == tables(one) == tables(two)
    assert pq.read_table(here / "train.parquet").num_rows == 2 * 1437


def test_an_actor_that_is_killed_goes_on_with_its_share(ray, tmp_path):
    dataset = ["--dataset", "sabotage:load_and_kill_actor", "--set"]
    given = [*EMBED, *dataset, f"dataset.options.marker={tmp_path / 'marker'}", "--cluster.workers", "2"]
    killed = run(tmp_path, "embed", "killed", *given)
    assert (tmp_path / "marker").exists()
    undisturbed = run(tmp_path, "embed", "undisturbed", *given)
    assert tables(killed) == tables(undisturbed)
    bills = [files(folder)["summary.json"]["phases"] for folder in (killed, undisturbed)]
    assert bills[0] == bills[1]


# Instructions: workers train together, and compute the rows part by part


@pytest.mark.parametrize("rule", ["less", "rds_plus"])
def test_no_one_and_two_workers_pick_the_same(ray, tmp_path, monkeypatch, rule):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    tiny_language("tiny")
    for split in ("train", "test"):
        instructions("pool", 60, name=f"{split}.jsonl")
        instructions("few", 6, sources=("sums",), seed=3, name=f"{split}.jsonl")
    # Dropout draws for each worker, so with it a warm-up depends on their number.
    options = ["rank=2", "alpha=4", "dropout=0"]
    given = ["--dataset", "instructions:pool", "--select.target", "instructions:few", "--select.rule", rule]
    given += ["--model", "transformers-lm:./tiny", *(f"--set=model.options.{each}" for each in options)]
    given += ["--set=dataset.options.length=64", "--select.fraction", "0.25", "--train.epochs", "1"]
    given += ["--train.batch_size", "8", "--rows.per_part", "16"]
    if rule == "less":
        given += ["--rows.width", "64", "--warmup.epochs", "2", "--warmup.fraction", "0.4", "--warmup.lr", "1e-3"]
    runs = [run(tmp_path, "instruct", count, *given, "--cluster.workers", count) for count in ("0", "1", "2")]
    here, one, two = (picks(each) for each in runs)
    assert here == one == two
    rows = [np.load(each / "pool.npy").astype(np.float32) for each in runs]
    for other in rows[1:]:
        np.testing.assert_allclose(other, rows[0], atol=2e-3)


# Comparisons

TABLE = """
from raypkg.studies.tables import Table

def table(scale):
    return Table(
        title="Rates",
        experiment="train",
        baseline="0.1",
        shared={"model": "mlp", "train.epochs": 3, "train.precision": "float32"},
        rows={"0.1": {}, "0.03": {"train.lr": 0.03}},
        seeds=(0, 1),
    )
"""


@pytest.fixture
def compared(tmp_path):
    """Return a function that runs the table and gives back the rows of its results."""
    (tmp_path / "mine.py").write_text(TABLE)

    def compared(name, *arguments):
        effray("compare", tmp_path / "mine.py", "--root", tmp_path, "--name", name, *arguments)
        rows = pq.read_table(tmp_path / "tune" / name / "results.parquet").to_pylist()
        return {(row["row"], row["seed"]): row["test_accuracy"] for row in rows if row["state"] == "done"}

    return compared


def test_with_and_without_ray_the_figures_are_the_same(ray, compared):
    assert compared("here", "--cluster.workers", "0") == compared("there")

"""LiPT on Ray: any number of workers, killed workers, a killed driver, and the same result every time."""

import json
import subprocess
from pathlib import Path

import pytest

from ray_runs import driver, effray, picks, run, same_weights, wait_for

TINY = [
    "--preset", "local-sgd", "--model", "mlp", "--train.precision", "float32", "--pretrain.precision", "float32",
    "--pretrain.models", "4", "--pretrain.epochs", "2", "--pretrain.batch_size", "32",
    "--train.epochs", "6", "--train.batch_size", "32", "--select.rule", "gradmatch", "--select.fraction", "0.2",
]  # fmt: skip


def lipt(root: Path, name: str, *options: str) -> Path:
    return run(root, "lipt", name, *TINY, *options)


def same_result(a: Path, b: Path, tolerance: float, merged: float | None = None) -> None:
    """Compare merged weights and the last ones, each to a tolerance, and the coreset exactly."""
    same_weights(a, b, tolerance if merged is None else merged, "pretrained.safetensors")
    same_weights(a, b, tolerance)
    assert picks(a) == picks(b)


@pytest.fixture(scope="module")
def undisturbed(ray, tmp_path_factory):
    return lipt(tmp_path_factory.mktemp("runs"), "one", "--cluster.workers", "1")


@pytest.mark.parametrize("workers", ["2", "3"])
def test_any_number_of_workers_gives_the_same_models_and_coreset(undisturbed, tmp_path, workers):
    """Main weights to 1e-4: sums of gradients have another order."""
    other = lipt(tmp_path, "other", "--cluster.workers", workers)
    assert json.loads((other / "summary.json").read_text())["workers"] == int(workers)
    same_result(undisturbed, other, tolerance=1e-4, merged=1e-6)


@pytest.mark.slow
def test_batch_norm_and_bfloat16_keep_the_merged_model_and_the_coreset(ray, tmp_path):
    """Each model trains on one worker, and each class is scored by itself: only the merge's sums change order."""
    precise = ["--model", "resnet8", "--pretrain.precision", "bfloat16"]
    one, three = (lipt(tmp_path, name, *precise, "--cluster.workers", name) for name in ("1", "3"))
    same_weights(one, three, 1e-6, "pretrained.safetensors")
    assert picks(one) == picks(three)


@pytest.mark.parametrize(("phase", "workers"), [("pretrain", "1"), ("select", "1"), ("train", "2")])
def test_a_killed_worker_changes_nothing(undisturbed, tmp_path, phase, workers):
    options = [f"--set=dataset.options.run={tmp_path}/lipt/hit", f"--set=dataset.options.phase={phase}"]
    folder = lipt(tmp_path, "hit", "--dataset", "sabotage:load", *options, "--cluster.workers", workers)
    assert (folder / "killed").exists()  # a worker did die
    same_result(undisturbed, folder, tolerance=0 if workers == "1" else 1e-4)


def test_a_killed_driver_resumes_from_the_last_epoch(undisturbed, tmp_path):
    options = ["--root", tmp_path, *TINY, "--name", "one", "--cluster.workers", "1"]
    with driver("lipt", *options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        checkpoints = tmp_path / "lipt/one/checkpoints/train"
        wait_for(lambda: len(list(checkpoints.glob("*.pt"))) > 0, process)
        process.kill()
    assert not (tmp_path / "lipt/one/summary.json").exists()
    effray("lipt", "--root", tmp_path, "--resume", "one")
    same_result(undisturbed, tmp_path / "lipt/one", tolerance=0)


def test_a_user_error_inside_a_worker_is_one_line(ray, tmp_path, capsys):
    effray("lipt", "--root", tmp_path, *TINY, "--train.lr", "1e30", "--cluster.workers", "2", code=2)
    error = capsys.readouterr().err
    assert "the loss became" in error and "phase 'train'" in error and error.count("\n") == 1

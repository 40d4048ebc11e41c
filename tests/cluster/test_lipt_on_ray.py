"""LiPT on Ray: any number of workers, killed workers, a killed driver, and the same result every time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from raypkg.cli import main

TINY = [
    "--model", "mlp", "--train.precision", "float32", "--pretrain.precision", "float32",
    "--pretrain.models", "4", "--pretrain.epochs", "2", "--pretrain.batch_size", "32",
    "--train.epochs", "6", "--train.batch_size", "32", "--select.rule", "gradmatch", "--select.fraction", "0.2",
]  # fmt: skip


def run(root: Path, name: str, *options: str) -> Path:
    with pytest.raises(SystemExit) as ended:
        main(["lipt", "--root", str(root), "--name", name, *TINY, *options])
    assert ended.value.code in (0, None)
    return root / "lipt" / name


def same_weights(a: Path, b: Path, file: str, tolerance: float) -> None:
    ours, theirs = load_file(a / file), load_file(b / file)
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=0, atol=tolerance), (file, name)


def same_coreset(a: Path, b: Path) -> None:
    assert pq.read_table(a / "coreset.parquet")["index"].equals(pq.read_table(b / "coreset.parquet")["index"])


def same_result(a: Path, b: Path, tolerance: float) -> None:
    same_weights(a, b, "pretrained.safetensors", tolerance)
    same_weights(a, b, "model.safetensors", tolerance)
    same_coreset(a, b)


@pytest.fixture(scope="module")
def undisturbed(ray, tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs"), "one", "--cluster.workers", "1")


@pytest.mark.parametrize("workers", ["2", "3"])
def test_any_number_of_workers_gives_the_same_models_and_coreset(undisturbed, tmp_path, workers):
    """Merged weights to 1e-6, main weights to 1e-4 (sums of gradients in another order), the coreset exactly."""
    other = run(tmp_path, "other", "--cluster.workers", workers)
    assert json.loads((other / "summary.json").read_text())["workers"] == int(workers)
    same_weights(undisturbed, other, "pretrained.safetensors", tolerance=1e-6)
    same_weights(undisturbed, other, "model.safetensors", tolerance=1e-4)
    same_coreset(undisturbed, other)


@pytest.mark.slow
def test_batch_norm_and_bfloat16_keep_the_merged_model_and_the_coreset(ray, tmp_path):
    """Each model trains on one worker, and each class is scored by itself: only the merge's sums change order."""
    precise = ["--model", "resnet8", "--pretrain.precision", "bfloat16"]
    one, three = (run(tmp_path, name, *precise, "--cluster.workers", name) for name in ("1", "3"))
    same_weights(one, three, "pretrained.safetensors", tolerance=1e-6)
    same_coreset(one, three)


@pytest.mark.parametrize(("phase", "workers"), [("pretrain", "1"), ("select", "1"), ("train", "2")])
def test_a_killed_worker_changes_nothing(undisturbed, tmp_path, phase, workers):
    options = [f"--set=dataset.options.run={tmp_path}/lipt/hit", f"--set=dataset.options.phase={phase}"]
    folder = run(tmp_path, "hit", "--dataset", "sabotage:load", *options, "--cluster.workers", workers)
    assert (folder / "killed").exists()  # a worker did die
    same_result(undisturbed, folder, tolerance=0 if workers == "1" else 1e-4)


def test_a_killed_driver_resumes_from_the_last_epoch(undisturbed, tmp_path):
    command = [sys.executable, "-c", "from raypkg.cli import script; script()", "lipt", "--root", str(tmp_path)]
    options = [*TINY, "--name", "one", "--cluster.workers", "1", "--cluster.address", "local"]
    with subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        checkpoints = tmp_path / "lipt/one/checkpoints/train"
        wait_for(lambda: len(list(checkpoints.glob("*.pt"))) > 0, driver)
        os.kill(driver.pid, signal.SIGKILL)
    assert not (tmp_path / "lipt/one/summary.json").exists()
    with pytest.raises(SystemExit) as ended:
        main(["lipt", "--root", str(tmp_path), "--resume", "one"])
    assert ended.value.code in (0, None)
    same_result(undisturbed, tmp_path / "lipt/one", tolerance=0)


def wait_for(condition, process, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)


def test_more_workers_than_cpus_is_one_line(ray, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["lipt", "--root", str(tmp_path), *TINY, "--cluster.workers", "64"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("effray: 64 workers of 1 CPU and 0 GPU do not fit the cluster, which has 3 CPU")
    assert error.count("\n") == 1
    assert not list((tmp_path / "lipt").glob("*"))


def test_a_user_error_inside_a_worker_is_one_line(ray, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["lipt", "--root", str(tmp_path), *TINY, "--train.lr", "1e30", "--cluster.workers", "2"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "the loss became" in error
    assert "phase 'train'" in error
    assert error.count("\n") == 1

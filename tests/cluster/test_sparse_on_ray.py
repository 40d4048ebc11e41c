"""Sparse training on Ray: two workers hold the masks of one, throughout."""

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from raypkg.cli import main

OPTIONS = [
    "--model", "mlp", "--train.precision", "float32", "--train.batch_size", "64", "--train.epochs", "6",
    "--density", "0.2", "--growth", "gradient", "--update_every_steps", "10", "--agent", "true",
]  # fmt: skip


def run(root, workers, name="", *options):
    name = name or workers
    with pytest.raises(SystemExit) as ended:
        main(["sparse", "--root", str(root), "--name", name, *OPTIONS, "--cluster.workers", workers, *options])
    assert ended.value.code in (0, None)
    return root / "sparse" / name


def test_two_workers_hold_the_masks_of_one(ray, tmp_path):
    one, two = run(tmp_path, "1"), run(tmp_path, "2")
    changes = [pq.read_table(folder / "topology.parquet") for folder in (one, two)]
    assert changes[0].equals(changes[1]) and len(changes[0]) > 10
    models = [load_file(folder / "model.safetensors") for folder in (one, two)]
    for name, weight in models[0].items():
        assert (weight != 0).equal(models[1][name] != 0)
        torch.testing.assert_close(weight, models[1][name], rtol=0, atol=1e-4)


def test_two_workers_one_of_them_lost_correct_as_undisturbed_ones_do(ray, tmp_path):
    marker = tmp_path / "killed"
    source = ["--dataset", "sabotage:load_and_kill_once", "--set", f"dataset.options.marker={marker}"]
    whole, robbed = run(tmp_path, "2"), run(tmp_path, "2", "robbed", *source)
    assert marker.exists()
    steps = [pq.read_table(folder / "correction.parquet") for folder in (whole, robbed)]
    assert max(steps[0]["c"].to_pylist()) > 0.1
    for a, b in zip(steps[0]["c"].to_pylist(), steps[1]["c"].to_pylist(), strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    for name, weight in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(weight, load_file(robbed / "model.safetensors")[name], rtol=0, atol=1e-5)

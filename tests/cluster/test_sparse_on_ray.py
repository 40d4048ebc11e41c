"""Sparse training on Ray: two workers hold the masks of one, throughout."""

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from ray_runs import run, same_weights

OPTIONS = [
    "--model", "mlp", "--train.precision", "float32", "--train.batch_size", "64", "--train.epochs", "6",
    "--density", "0.2", "--growth", "gradient", "--update_every_steps", "10", "--agent.form", "measured",
]  # fmt: skip


def sparse(root, workers, name="", *options):
    return run(root, "sparse", name or workers, *OPTIONS, "--cluster.workers", workers, *options)


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

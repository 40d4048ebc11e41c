"""Sparse training on Ray: two workers hold the masks of one, throughout."""

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from raypkg.cli import main

OPTIONS = [
    "--model", "mlp", "--train.precision", "float32", "--train.batch_size", "64", "--train.epochs", "6",
    "--density", "0.2", "--growth", "gradient", "--update_every", "10", "--correction", "agent",
]  # fmt: skip


def run(root, workers):
    with pytest.raises(SystemExit) as ended:
        main(["sparse", "--root", str(root), "--name", workers, *OPTIONS, "--cluster.workers", workers])
    assert ended.value.code in (0, None)
    return root / "sparse" / workers


def test_two_workers_hold_the_masks_of_one(ray, tmp_path):
    one, two = run(tmp_path, "1"), run(tmp_path, "2")
    changes = [pq.read_table(folder / "topology.parquet") for folder in (one, two)]
    assert changes[0].equals(changes[1]) and len(changes[0]) > 10
    models = [load_file(folder / "model.safetensors") for folder in (one, two)]
    for name, weight in models[0].items():
        assert (weight != 0).equal(models[1][name] != 0)
        torch.testing.assert_close(weight, models[1][name], rtol=0, atol=1e-4)

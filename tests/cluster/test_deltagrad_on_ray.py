"""DeltaGrad on Ray: the same weights whoever trains, whoever computes the gradients, and whoever dies."""

import json

import numpy as np
import pytest

from ray_runs import effray, same_weights

OPTIONS = ["--dataset", "libsvm:rows.svm", "--train.epochs", "20", "--train.batch_size", "4096"]
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
        effray("deltagrad", "train", "--name", name, *OPTIONS, "--cluster.workers", workers)
        effray("deltagrad", "delete", name, "--ids", "1,2,3,4,5", "--cluster.workers", workers)
    same_weights(folder / "alone", folder / "two", tolerance=1e-12)
    capsys.readouterr()
    effray("deltagrad", "verify", "two", "--cluster.workers", "2")
    distance = next(line for line in capsys.readouterr().out.splitlines() if "distance of" in line)
    assert float(distance.split()[4]) < 1e-3
    entry = json.loads((folder / "two/log.jsonl").read_text().splitlines()[-1])
    assert (entry["deleted"], entry["steps"]) == (5, 20)

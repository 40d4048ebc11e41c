"""`effray instruct` on a cluster: workers train together, and compute the rows part by part."""

import numpy as np
import pytest

from ray_runs import picks, run
from tiny_language import instructions, tiny_language


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

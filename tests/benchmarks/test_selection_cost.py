"""What GradMatch adds to the forward pass that it needs, on CIFAR-10. Run with: pytest -m bench -s."""

import os
import statistics
import time
from pathlib import Path

import pytest
import torch

from raypkg.core.settings import Dataset, Select
from raypkg.coresets.record import Record
from raypkg.coresets.sharded import LiveModel, select_coreset
from raypkg.data import load_data
from raypkg.engine.shards import WorkerShards, class_shards
from raypkg.models import build_model

pytestmark = [pytest.mark.bench, pytest.mark.data]
DATA = Path(os.environ.get("EFFRAY_DATA", Path(__file__).parents[3] / "shared/data"))


def test_selection_against_the_forward_pass():
    dataset = Dataset(name=f"parquet:{DATA}/cifar10")
    data = load_data(dataset.name)
    everyone, none = torch.arange(len(data.train)), torch.empty(0, dtype=torch.int64)
    (shard,) = class_shards(data, data.train.y, everyone, none, 1)
    scorer = LiveModel(build_model("resnet20", data.train.shape, 10, seed=0), "auto")
    settings, record = Select(rule="gradmatch", fraction=0.1), Record.empty(data.train.y)

    def forward():
        for label in range(10):
            scorer.view(shard, everyone[data.train.y == label])

    def selection():
        select_coreset(WorkerShards([shard]), [scorer], settings, record, everyone, seed=0)

    def seconds(work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    pairs = [(seconds(forward), seconds(selection)) for _ in range(3)]
    print(f"\nCIFAR-10, resnet20, {len(everyone):,} samples, {torch.get_num_threads()} threads, medians of 3 in turn")
    print(f"  forward pass alone               {statistics.median(a for a, _ in pairs):7.1f} s")
    print(f"  GradMatch 10 %, forward included {statistics.median(b for _, b in pairs):7.1f} s")
    print(f"  ratio                            {statistics.median(b / a for a, b in pairs):7.2f}")

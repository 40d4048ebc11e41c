"""The choice of no workers for a small plan: by its counted operations, never by a measurement."""

import sys
import tomllib
from types import SimpleNamespace

import pytest
import torch

from ray_runs import effray
from raypkg.cluster.session import is_apart
from raypkg.core.settings import Model
from raypkg.data import Data, load_data
from raypkg.data.split import Split
from raypkg.experiments import phases
from raypkg.experiments.phases import BOUND, main_stage, operations, selection_stage, with_workers
from raypkg.experiments.samples import Samples
from raypkg.experiments.train import TrainSettings

N, D, CLASSES = 90, 20, 3
SPLIT = Split.from_tensors(torch.randn(100, D), torch.arange(100) % CLASSES)
SAMPLES = Samples(Data(SPLIT, SPLIT), torch.arange(N), torch.arange(N, 100))
FORWARD = 2 * (D * CLASSES + CLASSES)  # of a linear model; each bias counts as a weight


def settings(**changes):
    return TrainSettings(model=Model(name="linear"), train={"epochs": 2}, **changes)


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Hide clusters that run on this machine, and its GPUs."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def chosen(settings):
    found, note = with_workers(settings, SAMPLES, [main_stage(settings)], "runs")
    is_open = settings.cluster.workers is None and is_apart(settings.cluster)
    assert ("Ray starts" in note) == (is_open and found == settings) and bool(note) == is_open
    return found.cluster.workers


def test_texts_count_by_their_own_length_not_by_the_longest_allowed(tmp_path):
    file = tmp_path / "a.tsv"
    lines = (f"{'good bad fine poor ' * 5}\t{number % 2}\n" for number in range(60))
    file.write_text("text\tlabel\n" + "".join(lines))
    counts = []
    for length in (32, 512):
        data = load_data(f"text:{file}", {"length": length})
        counts.append(operations(Model(name="transformer"), Samples.all_of(data.train), [selection_stage()]))
    assert counts[0] == pytest.approx(counts[1], rel=0.1)


def test_the_number_of_operations_decides(alone):
    whole = settings()
    assert chosen(whole) == 0
    count = FORWARD * 3 * 2 * N
    assert operations(whole.model, SAMPLES, [selection_stage(), main_stage(whole)]) == FORWARD * N + count
    alone.setattr(phases, "BOUND", count)
    assert chosen(whole) is None
    alone.setattr(phases, "BOUND", count + 1)
    assert chosen(whole) == 0
    assert chosen(settings(cluster={"workers": 2})) == 2  # a given number wins
    assert chosen(whole.model_copy(update={"model": Model(name="my_code:net")})) is None  # not built for it


@pytest.mark.parametrize("there", ["address", "job", "ray start", "joined", "GPU"])
def test_a_cluster_or_a_gpu_is_used(alone, tmp_path, there):
    address = {"address": "10.0.0.1:6379"} if there == "address" else {}
    match there:
        case "job":
            alone.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        case "ray start":
            (tmp_path / "ray").mkdir()
            (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379")
        case "joined":
            alone.setattr(sys.modules["ray"], "is_initialized", lambda: True)
        case "GPU":
            alone.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen(settings(cluster=address)) is None


def test_a_run_says_so_and_stores_it(alone, tmp_path, monkeypatch, capsys, blank_pictures):
    monkeypatch.chdir(tmp_path)
    effray(*"train --model linear --train.epochs 1 --name one".split())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cluster.workers")]
    assert lines == ["cluster.workers = 0, this process: 5.1e+06 operations, and Ray's start pays from 3e+11 on"]
    stored = tomllib.loads((tmp_path / "runs/train/one/config.toml").read_text())
    assert stored["cluster"]["workers"] == 0 and BOUND == 3e11

    effray(*"select --model-from one --rule grand --fraction 0.1".split())
    assert "cluster.workers = 0, this process: 1.7e+06 operations" in capsys.readouterr().out

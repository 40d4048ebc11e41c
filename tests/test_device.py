"""The modes of a device in training and its peak; see tests/test_gpu.py for what only a GPU shows."""

import gzip
import json
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from raypkg.cli.runs import HELD
from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.settings import Training
from raypkg.data.kinds import TEXTS
from raypkg.data.split import Split
from raypkg.engine import loop
from raypkg.engine.loop import TRACE, TRACED, fit, training_flops
from raypkg.engine.run import Hook, Run
from raypkg.engine.worker import CUBLAS, Worker, arithmetic, peak_of
from raypkg.experiments import experiment, settings_of
from raypkg.experiments.samples import open_samples
from raypkg.experiments.training import Job, train_model
from raypkg.models import build_model
from raypkg.runs.storage import Storage

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS = Split.from_tensors(torch.arange(24.0).view(12, 2), torch.arange(12) % 2)


class Modes(Hook):
    def on_gradients(self, run):
        self.seen = (torch.are_deterministic_algorithms_enabled(), os.environ.get(CUBLAS))


def test_a_deterministic_training_leaves_the_process_as_it_was(monkeypatch):
    monkeypatch.delenv(CUBLAS, raising=False)
    modes = Modes()
    fit(Run.simple(nn.Linear(2, 2), ROWS, hooks=[modes], epochs=1, batch_size=4, deterministic=True))
    assert modes.seen == (True, ":4096:8")
    assert not torch.are_deterministic_algorithms_enabled() and CUBLAS not in os.environ
    fit(Run.simple(nn.Linear(2, 2), ROWS, hooks=[modes], epochs=1, batch_size=4))
    assert modes.seen == (False, None)


def test_an_operation_without_a_deterministic_form_is_one_line():
    line = "train.deterministic = true: put_ does not have a deterministic implementation"
    with pytest.raises(UserError, match=line), arithmetic(Training(deterministic=True), CPU, fixed_shapes=True):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    with pytest.raises(RuntimeError, match="shapes"), arithmetic(Training(deterministic=True), CPU, fixed_shapes=True):
        raise RuntimeError("shapes")


def test_a_gpu_gets_its_modes_and_loses_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.allow_tf32, products.allow_tf32, cudnn.benchmark, cudnn.deterministic)
    for settings, inside in (
        (Training(), (False, False, True, False)),
        (Training(precision="float32", tf32=True), (True, True, True, False)),
        (Training(deterministic=True), (False, False, False, True)),
    ):
        with arithmetic(settings, CUDA, fixed_shapes=True):
            assert (cudnn.allow_tf32, products.allow_tf32, cudnn.benchmark, cudnn.deterministic) == inside
        assert (cudnn.allow_tf32, products.allow_tf32, cudnn.benchmark, cudnn.deterministic) == before
    with arithmetic(Training(), CUDA, fixed_shapes=False):
        assert not cudnn.benchmark


def test_tf32_is_refused_where_it_would_do_nothing(monkeypatch):
    tf32 = Training(precision="float32", tf32=True)
    with pytest.raises(UserError, match=r"train.tf32 = true: cpu has no TF32"):
        fit(Run.simple(nn.Linear(2, 2), ROWS, tf32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match=r"compute capability 8.0"), arithmetic(tf32, CUDA, fixed_shapes=True):
        pass
    with pytest.raises(UserError, match=r"tf32 = true does nothing with precision = auto"):
        Training(tf32=True)


@pytest.mark.parametrize(
    ("name", "settings", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", {"precision": "bfloat16"}, 989e12),
        ("NVIDIA H100 PCIe", {"precision": "bfloat16"}, 756e12),
        ("NVIDIA A100-SXM4-40GB", {"precision": "float32", "tf32": True}, 156e12),
        ("NVIDIA A10", {"precision": "float32"}, 31.2e12),
        ("NVIDIA L4", {"precision": "float64"}, 0),
        ("NVIDIA L40", {"precision": "bfloat16"}, 0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", {"precision": "bfloat16"}, 0),
    ],
)
def test_peaks_by_the_names_of_devices(monkeypatch, name, settings, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_of(CUDA, Training(**settings)) == peak


def test_operations_are_billed_where_the_peak_is_known(monkeypatch):
    monkeypatch.setattr(loop, "peak_of", lambda device, settings: 1e9)
    run = fit(Run.simple(nn.Linear(2, 2), ROWS, epochs=3, batch_size=5))
    assert run.cost.operations == 3 * 12 * (3 * 2 * 4)  # epochs, samples, three passes of 2 × 4 operations
    assert run.cost.record()["peak"] == 1e9
    frozen = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    frozen[0].requires_grad_(False)
    assert training_flops(frozen, ROWS) * 2 == 2 * (2 * 6) + 3 * (2 * 6)


def test_texts_cost_in_proportion_to_their_length():
    model = build_model("transformer", (8, 50), 3, seed=0)
    per_token = 2 * 3 * 2 * (4 * 128 * 128 + 2 * 4 * 128 * 128)  # 2 layers, 3 passes, 2 per weight
    texts = SimpleNamespace(shape=(8, 50), kind=TEXTS)
    assert training_flops(model, texts) == pytest.approx((8 * per_token + 3 * 2 * 128 * 3) / (2 * 8))


@pytest.mark.usefixtures("blank_pictures")
def test_a_profile_traces_steps_of_the_second_epoch_and_changes_nothing_else(tmp_path):
    files = []
    for profile in (False, True):
        settings = {"model": "mlp", "train.epochs": 3, "train.batch_size": 64, "track.profile": profile}
        chosen = load_settings(settings_of(experiment["train"]), {}, settings)
        storage = Storage(str(tmp_path / str(profile)))
        record = train_model(Worker(), Job(chosen, chosen.train, storage))
        files.append(storage.read("model.safetensors"))
    assert files[0] == files[1] and TRACE not in os.listdir(tmp_path / "False")
    assert record["findings"][0] == "trace.json.gz: steps of epoch 2" and HELD.fullmatch(TRACE)
    events = json.loads(gzip.decompress((tmp_path / "True" / TRACE).read_bytes()))["traceEvents"]
    updates = [event for event in events if event.get("name") == "Optimizer.step#SGD.step"]
    steps = chosen.train.steps_per_epoch(open_samples(chosen).train_indices.numel())
    assert len(updates) == min(TRACED, steps)


def test_a_profile_is_refused_where_there_is_no_second_epoch():
    for kind, settings in (("train", {"train.epochs": 1}), ("select", {"model_from": "it"})):
        with pytest.raises(
            UserError, match=r"track.profile traces the second epoch of training: there are [01] epochs"
        ):
            load_settings(settings_of(experiment[kind]), {}, settings | {"track.profile": True})

"""LiPT's pre-training in a script of one's own: effray's own run bit for bit, forms of data, and bad input."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from raypkg import build_model, lipt, load_data
from raypkg.cli import main
from raypkg.core.errors import UserError
from raypkg.runs.checkpoints import load_tensors
from raypkg.runs.storage import Storage

RNG = torch.Generator().manual_seed(0)
X = torch.randn(120, 6, generator=RNG)
Y = torch.arange(120) % 3
SMALL = {"models": 3, "epochs": 2, "batch_size": 8, "density": 0.5}


class Pairs(Dataset):
    """A data set that is no tensor."""

    def __init__(self, x=X, y=Y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], int(self.y[index])


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3))


def same(model, other):
    a, b = (each if isinstance(each, dict) else each.state_dict() for each in (model, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


OPTIONS = {
    "published": {},
    "local SGD": {"sparsity": None, "rounds": 2},
    "float64": {"precision": "float64", "merge": "mean", "randaugment": False},
}


@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["mlp", "resnet8"])
def test_a_script_gives_the_weights_of_effrays_own_run(tmp_path, name, options):
    line = f"lipt --root {tmp_path} --name a --dataset digits --dataset.validation 0 --model {name} --seed 3"
    line += " --pretrain.models 3 --pretrain.epochs 2 --train.epochs 1 --cluster.workers 0"
    line += "".join(f" --pretrain.{key} {str(value or False).lower()}" for key, value in options.items())
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert not ended.value.code

    digits = load_data("digits").train
    model = build_model(name, digits.shape, digits.num_classes, seed=3)
    merged = lipt.pretrain(model, digits, models=3, epochs=2, seed=3, **options)
    same(merged, load_tensors(Storage(str(tmp_path / "lipt/a")), "pretrained.safetensors"))
    same(model, build_model(name, digits.shape, digits.num_classes, seed=3))  # it has not changed


class Noisy(Pairs):
    """Draws from PyTorch's global generator."""

    def __getitem__(self, index):
        return self.x[index] + torch.randn(6), int(self.y[index])


def test_samples_come_in_any_form():
    model = mlp()
    merged = lipt.pretrain(model, (X, Y), **SMALL)
    same(merged, lipt.pretrain(model, TensorDataset(X.double(), Y), **SMALL))
    same(merged, lipt.pretrain(model, Pairs(), **SMALL))
    same(model, mlp())
    assert any(not torch.equal(a, b) for a, b in zip(merged.parameters(), model.parameters(), strict=True))
    state = torch.get_rng_state()
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with without_gradients():
            same(merged, lipt.pretrain(model, (X.clone(), Y.clone()), **SMALL))
    lipt.pretrain(model, Noisy(), **SMALL)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_may_have_more_outputs_another_precision_and_tied_weights():
    model = nn.Linear(6, 5).bfloat16()
    merged = lipt.pretrain(model, (X, Y), **SMALL)
    assert merged.weight.dtype == torch.bfloat16 and not torch.equal(merged.weight, model.weight)
    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    tied[2].weight = tied[0].weight
    merged = lipt.pretrain(tied, (X, Y), **SMALL)
    assert merged[0].weight is merged[2].weight and merged(X).isfinite().all()


def test_images_arrive_as_they_are():
    images = torch.rand(60, 2, 3, 4, generator=RNG)
    split = lipt.as_split(Pairs(images, Y[:60]))
    x, y = split.batch([5, 1])
    torch.testing.assert_close(split.inputs(x), images[[5, 1]], rtol=2e-7, atol=0)
    torch.testing.assert_close(split.inputs(x, torch.float64), images[[5, 1]].double(), rtol=1e-15, atol=0)
    assert y.tolist() == [2, 1]
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(48, 3))
    same(lipt.pretrain(model, (images, Y[:60]), **SMALL), lipt.pretrain(model, Pairs(images, Y[:60]), **SMALL))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((X, Y), {"lr": -1}, r"^lr = -1: "),
        ((X, Y), {"densty": 1}, "unknown argument of pretrain 'densty', did you mean 'density'"),
        ((X, Y), {"rounds": 9}, "^rounds = 9: models are merged after whole epochs"),
        ((X, Y), {"sparsity": None}, "without masks: give sparsity as well"),
        ((X, Y), {"models": 50}, "a shard of 2 samples holds none of"),
        ((X, Y), {"randaugment": True}, "only the uint8 images of a Split are augmented"),
        ((X.long(), Y), {}, r"a sample is torch.int64 \[6\]"),
        ((X, Y.double()), {}, r"labels must be integers from 0 up, \[b\]; a batch has torch.float64"),
        ((X, Y + 10**12), {}, "takes labels below 1048576; the largest is 1000000000002"),
        ((X, torch.arange(120) % 4), {}, r"model 'Sequential' maps inputs \(2, 6\) to \(2, 3\), not to \(2, 4\)"),
        ((X * torch.nan, Y), {}, "to NaN or infinity"),
        ((X[:0], Y[:0]), {}, "takes at least one sample; the data set is empty"),
        ((X, Y[:5]), {}, r"takes tensors \(x, y\) of equal lengths, not \[120, 5\]"),
        ([{"x": x, "labels": 0} for x in X], {}, r"takes samples \(x, y\), not mappings"),
        (X, {}, r"the data set must return pairs \(x, y\); a batch is a Tensor"),
        ((X, Y), {"model": mlp().requires_grad_(False)}, r"takes an nn\.Module with parameters that require gradients"),
        ((X, Y), {"model": torch.relu}, r"takes an nn\.Module with parameters that require gradients, not this"),
    ],
)
def test_bad_input_is_one_error_and_changes_nothing(data, options, message):
    model = mlp()
    with pytest.raises(UserError, match=message) as error:
        lipt.pretrain(**{"model": model, "dataset": data, **SMALL, **options})
    assert "\n" not in str(error.value)
    same(model, mlp())


@pytest.mark.ray
def test_workers_give_the_weights_of_this_process(ray):
    """The sums of the merge have another order in float64, which does not show in float32."""
    model = mlp()
    alone = lipt.pretrain(model, Pairs(), **SMALL, rounds=2)
    together = lipt.pretrain(model, Pairs(), **SMALL, rounds=2, workers=2)
    torch.testing.assert_close(dict(alone.state_dict()), dict(together.state_dict()), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="the loss became"):
        lipt.pretrain(model, Pairs(), **SMALL, lr=1e30, workers=2)

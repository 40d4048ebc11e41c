"""Activation checkpointing: the gradients, statistics and updates of the plain model, from fewer kept activations."""

import copy

import pytest
import torch
from torch import nn

from raypkg.core.errors import UserError
from raypkg.core.settings import Training
from raypkg.data.kinds import kind_of
from raypkg.data.split import Split
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.models import build_model
from raypkg.models.operations import checkpoint_blocks

IMAGE, TEXT = (3, 16, 16), (12, 50)


def kept_bytes(model, x):
    """Return the outputs of a model and the bytes that autograd keeps for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
    return out, sum(kept.values())


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("resnet20", IMAGE, {"width": 4}),
        ("resnet8", IMAGE, {"width": 4, "norm": "frozen"}),
        ("wrn-28-2", IMAGE, {"dropout": 0.3}),
        ("transformer", TEXT, {"dropout": 0.3, "layers": 3}),
        ("torchvision:resnet18", (3, 32, 32), {}),
    ],
)
def test_gradients_and_statistics_are_those_of_the_plain_model(name, shape, options):
    plain = build_model(name, shape, 4, seed=0, options=options)
    x = kind_of(shape).example(6, shape)
    thrifty = copy.deepcopy(plain)
    checkpoint_blocks(thrifty)
    twin = copy.deepcopy(thrifty)  # as AGENT's snapshot
    found, kept = [], []
    for model in (plain, thrifty, twin):
        torch.manual_seed(1)
        out, size = kept_bytes(model, x)
        out.square().sum().backward()
        kept.append(size)
        found.append([weight.grad for weight in model.parameters()] + [*model.buffers()])
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(*found, strict=True))
    assert kept[1] < 0.8 * kept[0]
    assert [*thrifty.state_dict()] == [*plain.state_dict()]
    assert thrifty.eval()(x).equal(plain.eval()(x))


def test_a_training_with_it_gives_the_same_weights():
    x = torch.randint(0, 256, (24, *IMAGE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = Split.from_tensors(x, torch.arange(24) % 4, augment=("flip",))
    ours, theirs = (
        fit(Run.simple(build_model("resnet8", IMAGE, 4, seed=0), split, epochs=2, batch_size=12, checkpointing=on))
        for on in (True, False)
    )
    torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict(), rtol=0, atol=0)


def test_it_is_refused_where_it_would_do_nothing():
    with pytest.raises(UserError, match="checkpointing = true would do nothing: the model has no blocks"):
        checkpoint_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    with pytest.raises(UserError, match="checkpointing does not go with compile"):
        Training(checkpointing=True, compile=True)

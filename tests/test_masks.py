"""Densities, counts and first masks against closed forms and definitions."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from raypkg.engine.loop import fit
from raypkg.methods.sparse.masks import allot, counts_of, enlarged, erk_densities, largest_masks, shapes_of
from raypkg.methods.sparse.rules import grasp_saliency, snip_saliency
from raypkg.models import build_model
from sparse_training import PLAIN, C, D, N, batch, rng, run, sparse


@pytest.mark.parametrize("seed", range(50))
def test_parts_add_up_and_follow_the_shares(seed):
    draw = np.random.default_rng(seed)
    names = "abcdef"[: draw.integers(1, 7)]
    shares, room = (dict(zip(names, draw.integers(1, 30, len(names)).tolist(), strict=True)) for _ in range(2))
    total = int(draw.integers(0, sum(room.values()) + 1))
    parts = allot(shares, total, room)
    assert sum(parts.values()) == total and all(0 <= parts[name] <= room[name] for name in names)
    if all(shares[name] * total / sum(shares.values()) < room[name] for name in names):
        twin = reference.shared_out(shares, total, room)
        assert all(abs(parts[name] - twin[name]) <= 1 for name in names)
        assert all(abs(parts[name] - shares[name] * total / sum(shares.values())) < 1 for name in names)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 0.9, 1.0])
def test_erk_counts_are_the_closed_form_to_one_weight(density):
    shapes = shapes_of(build_model("lenet5", (1, 28, 28), 10, seed=0, options={}))
    expected = {name: d * shapes[name].numel() for name, d in erk_densities(shapes, density).items()}
    counts = counts_of(shapes, erk_densities(shapes, density))
    assert all(abs(counts[name] - expected[name]) < 1 for name in shapes)
    assert sum(counts.values()) == round(density * sum(shape.numel() for shape in shapes.values()))
    assert all(count <= shapes[name].numel() for name, count in counts.items())


def test_saliencies_equal_their_definitions_and_leave_the_model_alone():
    model = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, C)).double()
    before, (x, y) = copy.deepcopy(model.state_dict()), batch()
    for name, value in grasp_saliency(model, x.double(), y).items():
        torch.testing.assert_close(value, reference.grasp(model, x.double(), y)[name], rtol=1e-6, atol=1e-10)
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    for name, value in snip_saliency(model, x.double(), y).items():
        twin = copy.deepcopy(model).train()
        F.cross_entropy(twin(x.double()), y).backward()
        torch.testing.assert_close(value, (twin.get_parameter(name).grad * weights[name]).abs())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_largest_masks_have_the_total_but_no_empty_layer():
    scores = {"a": torch.arange(50.0) + 10, "b": torch.arange(5.0)}
    masks = largest_masks(scores, 0.2)
    assert masks["a"].sum() == 11 and masks["b"].tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("shape", [(5, 40), (6, 3, 3, 3)])
def test_first_weights_suit_the_inputs_that_exist(shape):
    weight, mask = torch.randn(shape, generator=rng()), torch.rand(shape, generator=rng(1)) < 0.3
    mask[2] = False
    torch.testing.assert_close(enlarged(weight, mask), reference.enlarged(weight, mask))


def test_signals_keep_their_size_where_first_weights_suit_their_inputs():
    still, x = PLAIN.model_copy(update={"epochs": 1, "lr": 1e-9}), torch.randn(N, D, generator=rng())

    def size(*hooks):
        model = build_model("mlp", (D,), C, seed=0, options={"hidden": [256] * 4})
        fit(run(*hooks, model=model, settings=still))
        return model.features(x).var(dim=0).mean()  # without what biases add

    suited, plain = (sparse(growth=None, density=0.05, fan_in=inputs) for inputs in ("sparse", "dense"))
    assert 0.2 < size(*suited) / size() < 5 and size(*plain) / size() < 0.01

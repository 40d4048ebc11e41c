"""LiPT's pieces against closed forms and slow twins."""

import pytest
import torch
from torch import nn

import reference
from raypkg.core.errors import UserError
from raypkg.methods.lipt.batchnorm import reestimate
from raypkg.methods.lipt.densities import redrawn
from raypkg.methods.lipt.merges import merge
from raypkg.methods.lipt.settings import Pretrain
from raypkg.methods.lipt.soup import Member, Soup, alone
from raypkg.methods.sparse.masks import erk_densities, prunable, random_masks
from raypkg.methods.sparse.rules import initial as sparsity


def state(*values):
    return {"w": torch.tensor(values)}


def member(*values, mask=None):
    return Member(state(*values), {} if mask is None else {"w": torch.tensor(mask, dtype=torch.bool)})


def test_a_soup_of_equal_models_is_the_model():
    model = {"w": torch.randn(3, 4), "b": torch.randn(4)}
    merged = Soup(model, [Member(model, {})] * 3).merged()
    assert all(torch.equal(value, model[name]) for name, value in merged.items())


def test_masked_mean_by_hand():
    members = [member(1.0, 2.0, 0.0, mask=(1, 1, 0)), member(3.0, 0.0, 0.0, mask=(1, 0, 0))]
    merged = merge["masked_mean"](state(9.0, 9.0, 9.0), members, total=alone)
    assert merged["w"].tolist() == [2.0, 2.0, 9.0]  # both, the first alone, neither: the initial value


def test_plain_mean_counts_pruned_weights_as_they_are():
    members = [member(1.0, 2.0, mask=(1, 1)), member(3.0, 0.0, mask=(1, 0))]
    assert merge["mean"](state(9.0, 9.0), members, total=alone)["w"].tolist() == [2.0, 1.0]


def test_soups_of_parts_add_up_in_any_order():
    generator = torch.Generator().manual_seed(0)
    initial = {"w": torch.randn(1000, generator=generator)}
    models = [
        Member({"w": torch.randn(1000, generator=generator)}, {"w": torch.rand(1000, generator=generator) < 0.5})
        for _ in range(10)
    ]
    merged = []
    for parts in ([models], [models[::2], models[1::2]], [models[::3], models[1::3], models[2::3]]):
        soups = [Soup(initial, part) for part in parts]
        merged.append(soups[0].merged(lambda sums, soups=soups: sums + sum(soup.sums for soup in soups[1:]))["w"])
    assert torch.allclose(merged[0], merged[1], rtol=0, atol=1e-7)
    assert torch.allclose(merged[0], merged[2], rtol=0, atol=1e-7)


def test_greedy_leaves_out_what_harms():
    def score(parameters):
        return -abs(parameters["w"].item() - 2)

    good, better, bad = member(1.0), member(3.0), member(-50.0)
    merged = merge["greedy"](state(0.0), [good, bad, better], gather=list, score=score)
    assert merged["w"].item() == 2.0  # the mean of good and better


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_snip_equals_the_definition_and_leaves_the_model_alone():
    model, x, y = tiny(), torch.randn(16, 5), torch.randint(3, (16,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = redrawn(sparsity["snip"](model, 0.3, batch=(x, y)), torch.Generator().manual_seed(0))
    ratios = {name: mask.double().mean().item() for name, mask in masks.items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert ratios == pytest.approx(reference.snip(model, x, y, 0.3))
    total = sum(ratios[name] * w.numel() for name, w in prunable(model).items())
    assert total == pytest.approx(round(0.3 * 64))


def test_erk_by_hand():
    shapes = {"a": torch.Size([10, 10]), "b": torch.Size([2, 2]), "c": torch.Size([16, 8, 3, 3])}
    densities = erk_densities(shapes, 0.1)
    assert densities["b"] == 1.0  # would exceed 1, so it is dense
    kept = 0.1 * (100 + 4 + 1152) - 4
    epsilon = kept / (20 + 30)  # Σ over the others of raw · size = Σ of the sums of dimensions
    assert densities["a"] == pytest.approx(epsilon * 20 / 100)
    assert densities["c"] == pytest.approx(epsilon * 30 / 1152)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.3, 0.9, 1.0])
def test_erk_has_the_total_density(density):
    shapes = {name: w.shape for name, w in prunable(tiny()).items()}
    densities = erk_densities(shapes, density)
    kept = sum(densities[name] * shape.numel() for name, shape in shapes.items())
    assert kept == pytest.approx(density * sum(shape.numel() for shape in shapes.values()))
    assert all(0 < d <= 1 for d in densities.values())


def test_masks_have_exact_counts_and_are_never_empty():
    shapes = {"a": torch.Size([7, 11]), "b": torch.Size([3, 3])}
    masks = random_masks(shapes, {"a": 0.5, "b": 0.01}, torch.Generator().manual_seed(0))
    assert masks["a"].sum() + masks["b"].sum() == round(0.5 * 77 + 0.01 * 9) + 1  # the total, but never none
    assert masks["b"].sum() == 1
    again = random_masks(shapes, {"a": 0.5, "b": 0.01}, torch.Generator().manual_seed(0))
    assert torch.equal(masks["a"], again["a"])


def test_batch_norm_statistics_are_those_of_the_inputs():
    model = nn.Sequential(nn.BatchNorm1d(4))
    x = torch.randn(64, 4) * 3 + 2
    assert reestimate(model, x.split(16)) == 64
    assert torch.allclose(model[0].running_mean, x.mean(0), atol=1e-5)
    assert torch.allclose(model[0].running_var, torch.stack([p.var(0) for p in x.split(16)]).mean(0), atol=1e-5)
    assert model[0].momentum == 0.1
    assert reestimate(nn.Linear(4, 2), x.split(16)) == 0


@pytest.mark.parametrize(("fraction", "size"), [(None, 250), (0.25, 250), (0.1, 100), (0.0001, 0)])
def test_shards_of_a_fraction(fraction, size):
    assert Pretrain(models=4, shard_fraction=fraction).shard_size(1000) == size


def test_shards_never_overlap():
    with pytest.raises(UserError, match=r"pretrain.shard_fraction = 0.3 for 4 disjoint shards: at most 1/4 = 0.25"):
        Pretrain(models=4, shard_fraction=0.3).shard_size(1000)

"""The contract of every rule of sparse training, over the four registries."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from raypkg.engine.loop import fit
from raypkg.engine.run import Hook
from raypkg.methods.sparse.masks import density_of, shapes_of
from raypkg.methods.sparse.rules import drop, growth, initial, redistribution
from sparse_training import batch, counts_over_time, network, rng, run, sparse

REGISTRIES = {"initial": initial, "drop": drop, "growth": growth, "redistribution": redistribution}
PAIRS = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry.entries]
FINITE = {"growth", "redistribution"}  # a drop rule may give ∞ to what stays
SETTINGS = {"initial": "sparse_init"}  # the settings of the registries, where they are called otherwise
DENSITIES = (0.1, 0.3, 0.5, 1.0)


class Layer(NamedTuple):
    """One layer of a model in training, as its topology sees it."""

    mask: Tensor
    weight: Tensor  # 0 where there is no weight
    gradient: Tensor
    momentum: Tensor


def layer(seed=0, shape=(7, 9), dtype=torch.float32):
    draws = rng(seed)
    mask = torch.rand(shape, generator=draws) < 0.4
    weight, gradient, momentum = (torch.randn(shape, generator=draws).to(dtype) for _ in range(3))
    return Layer(mask, weight * mask, gradient, momentum)


def called(kind, name, layer, *, seed=0, model=None, samples=None):
    """Return what a rule says of a layer, or of a model where it begins, as one tensor."""
    rule = REGISTRIES[kind][name]
    if kind == "initial":
        masks = rule(model or network(), 0.3, rng=rng(seed), batch=samples or batch())
        return torch.cat([mask.flatten() for mask in masks.values()])
    if kind == "drop":
        return rule(layer.weight[layer.mask])
    if kind == "redistribution":
        return torch.tensor(rule(layer.weight[layer.mask], momentum=layer.momentum[layer.mask]))
    return rule(layer.weight, gradient=layer.gradient, momentum=layer.momentum, rng=rng(seed))


def registered(kind):
    """Run a test for every rule of a kind."""
    return pytest.mark.parametrize("name", REGISTRIES[kind].entries)


every_rule = pytest.mark.parametrize(("kind", "name"), PAIRS)


@every_rule
def test_a_result_follows_from_the_generator_that_a_rule_declares(kind, name):
    first, again, other = (called(kind, name, layer(), seed=seed) for seed in (3, 3, 1))
    assert first.equal(again)
    assert first.equal(other) != ("rng" in REGISTRIES[kind][name].declares)


@every_rule
def test_inputs_and_the_global_generator_are_untouched(kind, name):
    tensors, model, samples = layer(), network(), batch()
    before = copy.deepcopy((tensors, model.state_dict(), samples, model.training))
    generator = torch.random.get_rng_state()
    called(kind, name, tensors, model=model, samples=samples)
    assert torch.random.get_rng_state().equal(generator)
    old_tensors, old_state, old_samples, was_training = before
    assert all(tensor.equal(old) for tensor, old in zip(tensors, old_tensors, strict=True))
    assert all(tensor.equal(old_state[key]) for key, tensor in model.state_dict().items())
    assert all(tensor.equal(old) for tensor, old in zip(samples, old_samples, strict=True))
    assert model.training == was_training
    assert all(parameter.grad is None for parameter in model.parameters())


# Scores and shares


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "name"), [pair for pair in PAIRS if pair[0] != "initial"])
def test_values_are_numbers_of_the_shape_asked_for(kind, name, dtype):
    tensors = layer(dtype=dtype)
    values = called(kind, name, tensors)
    shapes = {"drop": (int(tensors.mask.sum()),), "growth": tensors.weight.shape, "redistribution": ()}
    assert values.shape == shapes[kind]
    assert not values.isnan().any() and not values.isneginf().any()
    assert values.isfinite().all() or kind not in FINITE


@registered("drop")
@pytest.mark.parametrize("weights", [[0.5], [0.0, 0.0, 0.0], [-1.0, -2.0], [2.0, 2.0, 2.0]])
def test_drop_rules_score_layers_of_any_kind(name, weights):
    scores = drop[name](torch.tensor(weights))
    assert scores.shape == (len(weights),) and not scores.isnan().any()


@registered("drop")
@pytest.mark.parametrize("seed", range(5))
def test_a_lower_score_is_a_weight_nearer_to_zero_on_its_side(name, seed):
    weights = layer(seed).weight[layer(seed).mask]
    scores = drop[name](weights)
    for side in (weights > 0, weights < 0):
        by_size = weights[side].abs().argsort()
        ordered = scores[side][by_size]
        assert (ordered[1:] >= ordered[:-1]).all()


# First masks


@registered("initial")
@pytest.mark.parametrize("density", DENSITIES)
def test_first_masks_have_their_density_exactly(name, density):
    model = network()
    masks = initial[name](model, density, rng=rng(), batch=batch())
    assert {key: mask.shape for key, mask in masks.items()} == shapes_of(model)
    assert all(mask.dtype == torch.bool and mask.any() for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    exact = 1.0 if name == "dense" else round(density * total) / total  # that is where gradual pruning begins
    assert density_of(masks) == exact


@registered("initial")
def test_first_masks_leave_out_weights_that_are_not_trained(name):
    model = network()
    frozen = next(iter(shapes_of(model)))
    model.get_parameter(frozen).requires_grad_(False)
    masks = initial[name](model, 0.3, rng=rng(), batch=batch())
    assert masks.keys() == shapes_of(model).keys() and frozen not in masks


# In training


class Watch(Hook):
    """Checks the weights of each change before the optimiser moves them."""

    def __init__(self, topology):
        self.topology = topology
        self.masks = {}
        self.grown = 0

    def on_gradients(self, run):
        for name, mask in self.topology.masks.items():
            weight = run.model.get_parameter(name)
            before = self.masks.get(name, mask)
            new = mask & ~before
            self.grown += int(new.sum())
            assert not weight[new].any() and not weight[~mask].any()
            for key, value in run.optimizer.state[weight].items():
                if value.shape == weight.shape:
                    assert not value[~mask].any()
                    expected = value[mask & before].mean() if key == "exp_avg_sq" else torch.tensor(0.0)
                    assert torch.allclose(value[new], expected, rtol=1e-6)
            self.masks[name] = mask.clone()


@every_rule
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_in_training_counts_stay_and_what_is_new_begins_at_zero(kind, name, optimizer):
    chosen = {SETTINGS.get(kind, kind): name}
    if (kind, name) == ("initial", "dense"):
        chosen["growth"] = None  # weights only go
    hooks = sparse(**chosen)
    topology = hooks[0]
    watch = Watch(topology)
    trained = run(*hooks, watch, epochs=3, optimizer=optimizer, weight_decay=0.1)
    fit(trained)
    totals = [sum(counts) for counts in counts_over_time(topology)]
    if topology.settings.growth:
        assert len(set(totals)) == 1 and watch.grown > 0
        if kind != "redistribution":
            assert len({tuple(counts) for counts in counts_over_time(topology)}) == 1
    else:
        assert totals == sorted(totals, reverse=True) and watch.grown == 0
    for parameter, mask in topology.masks.items():
        assert not trained.model.get_parameter(parameter)[~mask].any()

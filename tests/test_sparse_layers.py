"""What sparsity saves: operations, compressed rows, and layers that compute with the weights that exist."""

import copy

import pytest
import torch
from torch import nn

from raypkg.engine.hooks import Hook
from raypkg.engine.loop import fit
from raypkg.methods.sparse.compute import (
    ActiveLinear,
    Pattern,
    active_flops,
    compressed,
    exchange_linear,
    expanded,
    forward_flops,
    only_active,
)
from raypkg.methods.sparse.hook import Active
from raypkg.methods.sparse.masks import shapes_of
from raypkg.models import build_model
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage
from sparse_training import PLAIN, STEPS, D, network, rng, run, sparse


def test_operations_of_lenet5():
    model = build_model("lenet5", (1, 28, 28), 10, seed=0, options={})
    flops = forward_flops(model, (1, 28, 28))
    expected = [2 * 25 * 6 * 28 * 28, 2 * 25 * 6 * 16 * 14 * 14, 2 * 784 * 120, 2 * 120 * 84, 2 * 84 * 10]
    assert list(flops.values()) == expected and set(flops) == set(shapes_of(model))
    half = {name: torch.arange(shape.numel()).view(shape) % 2 == 0 for name, shape in shapes_of(model).items()}
    assert active_flops(flops, half) == sum(expected) // 2


@pytest.mark.parametrize("columns", [5, 40_000])
def test_compressed_rows_come_back(columns):
    weight = torch.randn(6, columns, generator=rng()) * (torch.rand(6, columns, generator=rng()) < 0.1)
    state = {"a.weight": weight.view(6, columns, 1, 1), "a.bias": torch.ones(6)}
    small = compressed(state, {"a.weight"})
    assert small["a.weight.columns"].dtype == (torch.int16 if columns == 5 else torch.int32)
    assert small["a.weight.values"].numel() == int((weight != 0).sum())
    assert all(value.equal(state[name]) for name, value in expanded(small).items())


def test_sparse_layers_compute_what_dense_ones_do():
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= torch.rand(p.shape, generator=rng()) < 0.3
        x = torch.randn(7, D, generator=rng())
        expected = model(x)
        torch.testing.assert_close(exchange_linear(model, only_active)(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), ()])
@pytest.mark.parametrize(("only", "whole"), [(True, False), (False, False), (False, True)])
def test_active_layers_have_the_gradients_of_masked_ones(only, whole, shape):
    masked, mask = nn.Linear(9, 7), torch.rand(7, 9, generator=rng()) < 0.3
    masked.weight.data *= mask
    sparse_layer = ActiveLinear(copy.deepcopy(masked))
    pattern = Pattern.of(mask)
    sparse_layer.pattern, sparse_layer.dense_gradient = pattern, whole
    if only:
        sparse_layer.weight.data = pattern.active(masked.weight.data)
    x = torch.randn(*shape, 9, generator=rng())
    gradients = []
    for layer in (masked, sparse_layer):
        inputs = x.clone().requires_grad_()
        layer(inputs).square().sum().backward()
        gradients.append((inputs.grad, layer.weight.grad, layer.bias.grad))
    if only:
        gradients[1] = (gradients[1][0], pattern.dense(gradients[1][1]), gradients[1][2])
    expected = (gradients[0][0], gradients[0][1] * (1 if whole else mask), gradients[0][2])
    for ours, theirs in zip(gradients[1], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "settings",
    [
        {"growth": "random"},
        {"growth": "gradient"},
        {"growth": "gradient", "update_every_steps": 1},
        {"growth": "random", "update_every_steps": 6},  # the steps of an epoch
        {"growth": "random", "redistribution": "magnitude"},
        {"growth": None, "sparse_init": "dense"},
    ],
)
def test_computing_sparse_trains_the_same_model(settings, optimizer, tmp_path):
    # In float64 no order of magnitudes hangs on rounding.
    precise = PLAIN.model_copy(
        update={"precision": "float64", "weight_decay": 1e-3, "optimizer": optimizer, "lr": 0.02}
    )

    def masked():
        return run(*sparse(**settings), settings=precise)

    def active():
        topology, _ = sparse(**settings)
        return run(topology, Active(topology.masks, topology.due), settings=precise)

    one = fit(masked())
    other = fit(active())
    assert all(mask.equal(other.hooks[0].masks[name]) for name, mask in one.hooks[0].masks.items())
    for ours, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert set(one.model.state_dict()) == set(other.model.state_dict())

    checkpoints = StoredCheckpoints(Storage(str(tmp_path)))
    stopped = active()
    stopped.last = 2
    fit(stopped, checkpoints=checkpoints)
    resumed = fit(active(), checkpoints=checkpoints)
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), resumed.model.parameters(), strict=True))


def test_computing_sparse_holds_only_the_weights_that_exist():
    topology, _ = sparse(growth="gradient")
    held = []

    class Shapes(Hook):
        def on_gradients(self, run):
            held.append({p.dim() for name, p in run.model.named_parameters() if name in topology.masks})

    fit(run(topology, Active(topology.masks, topology.due), Shapes()))
    assert held == [{2} if topology.due(step) else {1} for step in range(STEPS)]

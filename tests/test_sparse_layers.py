"""Computing with active weights only: operations, compressed rows, sparse layers, transformers."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import reference
from raypkg.engine.loop import fit
from raypkg.engine.run import Hook
from raypkg.methods.sparse import initial
from raypkg.methods.sparse.compute import ActiveLinear, Pattern, compressed, expanded
from raypkg.methods.sparse.hook import FootprintReport
from raypkg.methods.sparse.masks import largest_masks, prunable, shapes_of
from raypkg.models import build_model
from raypkg.models.operations import forward_flops
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage
from sparse_training import STEPS, D, rng, run, sparse, split
from transformer_rows import PLACES, WIDTH, Transformer


def assert_same_weights(a, b, **tolerances):
    for (name, ours), theirs in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


def active_flops(model, shape, masks):
    report = FootprintReport(model, SimpleNamespace(masks=masks))
    return report.results(SimpleNamespace(split=SimpleNamespace(shape=shape))).facts["active_flops"]


def test_operations_of_lenet5():
    model = build_model("lenet5", (1, 28, 28), 10, seed=0, options={})
    flops = forward_flops(model, (1, 28, 28))
    expected = [2 * 25 * 6 * 28 * 28, 2 * 25 * 6 * 16 * 14 * 14, 2 * 784 * 120, 2 * 120 * 84, 2 * 84 * 10]
    assert list(flops.values()) == expected and set(flops) == set(shapes_of(model))
    half = {name: torch.arange(shape.numel()).view(shape) % 2 == 0 for name, shape in shapes_of(model).items()}
    assert active_flops(model, (1, 28, 28), half) == sum(expected) // 2


@pytest.mark.parametrize("columns", [5, 40_000])
def test_compressed_rows_come_back(columns):
    weight = torch.randn(6, columns, generator=rng()) * (torch.rand(6, columns, generator=rng()) < 0.1)
    state = {"a.weight": weight.view(6, columns, 1, 1), "a.bias": torch.ones(6)}
    small = compressed(state, {"a.weight"})
    assert small["a.weight.columns"].dtype == (torch.int16 if columns == 5 else torch.int32)
    assert small["a.weight.values"].numel() == int((weight != 0).sum())
    assert all(value.equal(state[name]) for name, value in expanded(small).items())


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


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("adamw", {"growth": "random"}),
        ("sgd", {"growth": "gradient", "update_every_steps": 1}),
        ("adamw", {"growth": "gradient"}),
        ("sgd", {"growth": "random", "update_every_steps": 6}),  # the steps of an epoch
        ("sgd", {"growth": None, "sparse_init": "dense"}),
        ("adamw", {"growth": None, "sparse_init": "dense"}),
    ],
)
def test_computing_sparse_trains_the_same_model(optimizer, settings, tmp_path):
    # In float64 no order of magnitudes hangs on rounding.
    precise = {"precision": "float64", "weight_decay": 1e-3, "optimizer": optimizer, "lr": 0.02}

    def training(active):
        return run(*sparse(active=active, **settings), **precise)

    masked, active = fit(training(active=False)), fit(training(active=True))
    assert all(mask.equal(active.hooks[0].masks[name]) for name, mask in masked.hooks[0].masks.items())
    assert_same_weights(masked.model, active.model, rtol=0, atol=1e-12)

    checkpoints = StoredCheckpoints(Storage(str(tmp_path)))
    stopped = training(active=True)
    stopped.last = 2
    fit(stopped, checkpoints=checkpoints)
    assert_same_weights(active.model, fit(training(active=True), checkpoints=checkpoints).model, rtol=0, atol=0)


def test_computing_sparse_holds_only_the_active_weights():
    held = []

    class Shapes(Hook):
        def on_gradients(self, run):
            held.append({p.dim() for name, p in run.model.named_parameters() if name in topology.masks})

    topology, *others = sparse(Shapes(), active=True, growth="gradient")
    fit(run(topology, *others))
    assert held == [{2} if topology.sparse.due(step) else {1} for step in range(STEPS)]


# Transformers


def batch(size=32):
    return split().batch(torch.arange(size))


def test_attention_and_mlps_are_masked_and_their_operations_counted_and_nothing_elses():
    flops, square = forward_flops(Transformer(), (D,)), WIDTH * WIDTH
    of_layer = {"self_attn.in_proj_weight": 3 * square, "self_attn.out_proj.weight": square}
    of_layer |= {"linear1.weight": 16 * WIDTH, "linear2.weight": 16 * WIDTH}
    layers = {f"encoder.layers.{i}.{name}": 2 * n * PLACES for i in range(2) for name, n in of_layer.items()}
    assert flops.keys() == prunable(Transformer()).keys() == layers.keys() | {"embedding.weight", "head.weight"}
    assert layers.items() <= flops.items()


def test_grasp_differentiates_attention_twice():
    model = Transformer().double()
    del model.position  # its weights the slow twin would count among those that masks apply to
    model.position = lambda places: 0.0
    model.encoder.layers = model.encoder.layers[:1]
    x, y = batch(8)
    masks = initial["grasp"](model, 0.3, options={}, rng=rng(), batch=(x.double(), y))
    with sdpa_kernel(SDPBackend.MATH):
        expected = largest_masks(reference.grasp(model, x.double(), y), 0.3)
    assert masks.keys() == expected.keys() and all(mask.equal(expected[name]) for name, mask in masks.items())


def test_multiplying_only_active_weights_gives_the_same_model():
    masked, active = (
        fit(run(*sparse(active=active), model=Transformer(), precision="float64")).model for active in (False, True)
    )
    assert_same_weights(masked, active, rtol=1e-4, atol=1e-7)
    with torch.inference_mode():
        torch.testing.assert_close(*(m.eval()(batch()[0].double()) for m in (masked, active)), rtol=1e-4, atol=1e-6)


def test_projections_of_their_own_are_masked_and_counted_each():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)

        def forward(self, x):
            x = x[:, 0]
            return self.attention(query=x, key=x[..., :4], value=x[..., :6])[0]

    inputs = {"q_proj_weight": 8, "k_proj_weight": 4, "v_proj_weight": 6, "out_proj.weight": 8}
    flops = forward_flops(Crossed(), (1, 5, 8))
    assert flops == {f"attention.{name}": 2 * 8 * count * 5 for name, count in inputs.items()}
    assert flops.keys() == prunable(Crossed()).keys()

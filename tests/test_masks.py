"""Masks and their changes: densities and rules against hand tables, the hook against loops written out."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from raypkg.core.errors import UserError
from raypkg.engine.loop import fit
from raypkg.engine.run import Hook
from raypkg.methods.agent.hook import Correction
from raypkg.methods.agent.settings import AgentOptions
from raypkg.methods.sparse import drop, growth, initial, redistribution
from raypkg.methods.sparse.masks import (
    active_counts,
    allot,
    density_of,
    drop_fraction,
    dropped,
    enlarged,
    erk_densities,
    grown,
    largest_masks,
    random_masks,
    shapes_of,
)
from raypkg.models import build_model
from sparse_training import C, D, batch, counts_over_time, network, rng, run, sparse


@pytest.mark.parametrize("seed", range(50))
def test_parts_add_up_and_follow_the_shares(seed):
    draw = np.random.default_rng(seed)
    names = "abcdef"[: draw.integers(1, 7)]
    shares, room = (dict(zip(names, draw.integers(1, 30, len(names)).tolist(), strict=True)) for _ in range(2))
    total = int(draw.integers(0, sum(room.values()) + 1))
    parts = allot(shares, total, room)
    assert sum(parts.values()) == total and all(0 <= parts[name] <= room[name] for name in names)
    if all(shares[name] * total / sum(shares.values()) < room[name] for name in names):
        assert all(abs(parts[name] - shares[name] * total / sum(shares.values())) < 1 for name in names)


@pytest.mark.parametrize("density", [0.001, 0.05, 0.1, 0.5, 0.9, 1.0])
def test_erk_counts_are_the_closed_form_to_one_weight(density):
    shapes = shapes_of(build_model("lenet5", (1, 28, 28), 10, seed=0, options={}))
    densities = erk_densities(shapes, density)
    expected = {name: d * shapes[name].numel() for name, d in densities.items()}
    counts = active_counts(random_masks(shapes, densities, rng()))
    assert all(0 < d <= 1 for d in densities.values())
    assert all(abs(counts[name] - expected[name]) < 1 for name in shapes)
    assert sum(counts.values()) == round(density * sum(shape.numel() for shape in shapes.values()))


def test_erk_by_hand():
    densities = erk_densities({"a": torch.Size([10, 10]), "b": torch.Size([2, 2]), "c": torch.Size([16, 8, 3, 3])}, 0.1)
    assert densities["b"] == 1.0  # would exceed 1, so it is dense
    active = 0.1 * (100 + 4 + 1152) - 4
    epsilon = active / (20 + 30)  # Σ over the others of raw · size = Σ of the sums of dimensions
    assert densities["a"] == pytest.approx(epsilon * 20 / 100)
    assert densities["c"] == pytest.approx(epsilon * 30 / 1152)


def test_no_layer_is_left_empty():
    shapes = {"a": torch.Size([7, 11]), "b": torch.Size([3, 3])}
    masks = random_masks(shapes, {"a": 0.5, "b": 0.01}, rng())
    assert masks["b"].sum() == 1 and masks["a"].sum() == round(0.5 * 77 + 0.01 * 9)
    masks = largest_masks({"a": torch.arange(50.0) + 10, "b": torch.arange(5.0)}, 0.2)
    assert masks["a"].sum() == 11 and masks["b"].tolist() == [False] * 4 + [True]


def test_saliencies_choose_by_their_definitions_and_leave_the_model_alone():
    model = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, C)).double()
    before, (x, y) = copy.deepcopy(model.state_dict()), batch()
    twin = copy.deepcopy(model).train()
    F.cross_entropy(twin(x.double()), y).backward()
    weights = {name: p for name, p in twin.named_parameters() if p.dim() > 1}
    snip = {name: (p.grad * p).abs() for name, p in weights.items()}
    for rule, saliency in (("snip", snip), ("grasp", reference.grasp(model, x.double(), y))):
        for density in np.arange(0.05, 1, 0.05):  # each weight's rank, to one in twenty
            masks = initial[rule](model, density, options={}, rng=rng(), batch=(x.double(), y))
            expected = largest_masks(saliency, density)
            assert all(mask.equal(expected[name]) for name, mask in masks.items()) and masks.keys() == expected.keys()
    ratios = {name: m.double().mean().item() for name, m in initial["snip"](model, 0.3, batch=(x.double(), y)).items()}
    assert ratios == pytest.approx(reference.snip(model, x.double(), y, 0.3))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("shape", [(5, 40), (6, 3, 3, 3)])
def test_first_weights_suit_the_inputs_that_exist(shape):
    weight, mask = torch.randn(shape, generator=rng()), torch.rand(shape, generator=rng(1)) < 0.3
    mask[2] = False
    torch.testing.assert_close(enlarged(weight, mask), reference.enlarged(weight, mask))


def test_what_rules_score():
    assert drop["magnitude"](torch.tensor([0.5, -0.1, -3.0])).equal(torch.tensor([0.5, 0.1, 3.0]))
    for weights, expected in (
        ([0.5, -0.1, -3.0, 0.2], [1.0, 0.5, 1.0, 0.5]),  # the half of each side that is nearest to zero
        ([0.0, -1.0], [0.5, 1.0]),
    ):
        torch.testing.assert_close(drop["set"](torch.tensor(weights)), torch.tensor(expected))
    momentum = torch.tensor([-0.5, 1.0])
    for name in ("gradient", "momentum"):
        assert growth[name](torch.zeros(2), gradient=momentum, momentum=momentum, rng=rng()).equal(momentum.abs())
    assert redistribution["momentum"](torch.tensor([1.0, -3.0]), momentum=momentum) == 0.75


def test_the_lowest_are_dropped_and_the_highest_grown_in_exact_counts():
    for seed in range(200):
        mask = torch.rand(7, 9, generator=rng(seed)) < 0.4
        scores = torch.randint(3, (7, 9), generator=rng(seed)).float()
        count = int(torch.randint(int(mask.sum()) + 1, (), generator=rng(seed)))
        fewer = dropped(mask, scores[mask], count)
        assert fewer.sum() == mask.sum() - count and not (fewer & ~mask).any()
        assert not count or not fewer.any() or scores[mask & ~fewer].max() <= scores[fewer].min()
        scores = scores.where(scores > 0, -torch.inf)  # a rule may rank weights last that it would never grow
        again = grown(fewer, scores, count)
        first = sorted((-score, i) for i, score in enumerate(scores.flatten().tolist()) if not fewer.view(-1)[i])
        expected = fewer.flatten().index_fill(0, torch.tensor([i for _, i in first[:count]], dtype=torch.int64), True)
        assert again.flatten().equal(expected)


def test_rigl_grows_where_the_raw_gradient_is_largest():
    """Step 4 changes the masks as sorting all weights does."""
    topology, *others = sparse(growth="gradient", drop="magnitude")
    expected = {}

    class Rigl(Hook):
        def on_gradients(self, run):
            for name, mask in topology.masks.items() if run.step == 4 else ():
                weight = run.model.get_parameter(name)
                count = int(drop_fraction(0.5, run.progress) * int(mask.sum()))
                after = mask.clone()
                smallest = sorted(mask.nonzero().tolist(), key=lambda at: abs(weight[tuple(at)].item()))
                for at in smallest[:count]:
                    after[tuple(at)] = False
                steepest = sorted((~after).nonzero().tolist(), key=lambda at: -abs(weight.grad[tuple(at)].item()))
                for at in steepest[:count]:
                    after[tuple(at)] = True
                expected[name] = after
            if run.step == 5:
                assert all(mask.equal(expected[name]) for name, mask in topology.masks.items())

    fit(run(Rigl(), topology, *others))
    assert expected


def test_a_full_layer_does_not_change():
    dense, full = fit(run()), fit(run(*sparse(density=1.0, growth="gradient")))
    assert all(torch.equal(a, b) for a, b in zip(dense.model.parameters(), full.model.parameters(), strict=True))


def test_weights_that_are_not_trained_are_left_alone():
    model = network()
    frozen = next(name for name, p in model.named_parameters() if p.dim() > 1)
    model.get_parameter(frozen).requires_grad_(False)
    before = model.get_parameter(frozen).clone()
    corrected = sparse(correction=[Correction(AgentOptions(form="measured"))], growth="gradient")
    for hooks in (corrected, sparse(active=True, growth="gradient")):
        trained = fit(run(*hooks, model=copy.deepcopy(model)))
        assert frozen not in hooks[0].masks and trained.model.get_parameter(frozen).equal(before)


class Partly(nn.Module):
    """Has a layer that it does not use."""

    def __init__(self):
        super().__init__()
        self.idle, self.hidden, self.head = nn.Linear(D, 8), nn.Linear(D, 8), nn.Linear(8, C)

    def forward(self, x):
        return self.head(self.hidden(x).relu())


@pytest.mark.parametrize("sparse_init", ["uniform", "snip", "grasp"])
@pytest.mark.parametrize("rule", ["gradient", "momentum"])
def test_a_layer_out_of_use_has_no_gradient(rule, sparse_init):
    redistribution = "momentum" if rule == "momentum" else None
    correction = [Correction(AgentOptions(form="measured", gamma=0.5))]
    hooks = sparse(correction=correction, growth=rule, redistribution=redistribution, sparse_init=sparse_init)
    fit(run(*hooks, model=Partly()))
    assert len({sum(layers) for layers in counts_over_time(hooks[0])}) == 1 and hooks[1].agent.weight.c


def test_gradual_pruning_ends_at_its_density():
    hooks = sparse(growth=None, sparse_init="dense", update_every_steps=1)
    trained = fit(run(*hooks))
    totals = [sum(layers) for layers in counts_over_time(hooks[0])]
    assert totals == sorted(totals, reverse=True) and totals[0] == sum(m.numel() for m in hooks[0].masks.values())
    assert totals[-1] == round(0.3 * totals[0])
    assert sum(int((p != 0).sum()) for p in trained.model.parameters() if p.dim() > 1) <= totals[-1]


@pytest.mark.parametrize("growth", [None, "gradient"])
def test_the_explored_share_is_that_of_the_union(growth):
    union = {}

    class Gather(Hook):
        def on_step(self, run):
            for name, mask in hooks[0].masks.items():
                union[name] = union.get(name, mask) | mask

    hooks = sparse(growth=growth)
    fit(run(*hooks, Gather()))
    assert hooks[0].sparse.explored == density_of(union)
    assert (density_of(union) > density_of(hooks[0].masks)) == (len(counts_over_time(hooks[0])) > 1) == bool(growth)


def flat(weight):
    return torch.zeros(3)


@pytest.mark.parametrize(
    ("kind", "rule", "message"),
    [
        ("drop", flat, r"drop rule '.*flat' returned shape \[3\] for \[\d+\] of"),
        ("growth", flat, r"growth rule '.*flat' returned shape \[3\] for \[16, 12\]"),
        ("growth", lambda weight, *, gradient: gradient / 0 * 0, "growth rule 'mine' returned NaN for"),
        ("sparse_init", lambda model, density: {}, "sparse initialisation 'mine' returned other layers"),
    ],
)
def test_a_users_rule_that_does_not_fit_is_refused(monkeypatch, kind, rule, message):
    registry = {"drop": drop, "growth": growth, "redistribution": redistribution, "sparse_init": initial}[kind]
    monkeypatch.setitem(registry._entries, "mine", registry._entry("mine", rule, ""))
    name = f"{__name__}:flat" if rule is flat else "mine"
    with pytest.raises(UserError, match=message):
        fit(run(*sparse(**{kind: name})))

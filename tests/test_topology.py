"""Which weights go and come: the rules against hand tables, the hook against loops written out."""

import copy

import pytest
import torch
from torch import nn

from raypkg.core.errors import UserError
from raypkg.engine.hooks import Hook
from raypkg.engine.loop import fit
from raypkg.methods.agent.hook import Correction
from raypkg.methods.agent.settings import AgentOptions
from raypkg.methods.sparse.hook import Active
from raypkg.methods.sparse.masks import density_of, drop_fraction, dropped, grown
from raypkg.methods.sparse.rules import drop, growth, initial, redistribution
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage
from sparse_training import PLAIN, STEPS, C, D, counts_over_time, network, rng, run, sparse


@pytest.mark.parametrize(
    ("name", "options", "weights", "expected"),
    [
        ("magnitude", {}, [0.5, -0.1, -3.0, 0.0], [0.5, 0.1, 3.0, 0.0]),
        ("set", {}, [0.5, -0.1, -3.0, 0.2], [1.0, 0.5, 1.0, 0.5]),  # the half of each side that is nearest to zero
        ("set", {}, [0.0, -1.0], [0.5, 1.0]),
        ("threshold", {"below": 0.3}, [0.5, -0.1, 0.2], [torch.inf, 0.1, 0.2]),
    ],
)
def test_what_drop_rules_score(name, options, weights, expected):
    torch.testing.assert_close(drop[name](torch.tensor(weights), options=options), torch.tensor(expected))


@pytest.mark.parametrize(
    ("name", "expected"), [("gradient", [[3.0, 1.0], [2.0, 0.0]]), ("momentum", [[1.0, 4.0], [0.0, 2.0]])]
)
def test_what_growth_rules_score(name, expected):
    gradient = torch.tensor([[-3.0, 1.0], [2.0, 0.0]])
    momentum = torch.tensor([[1.0, -4.0], [0.0, 2.0]])
    scores = growth[name](torch.zeros(2, 2), gradient=gradient, momentum=momentum, rng=rng())
    assert torch.equal(scores, torch.tensor(expected))


@pytest.mark.parametrize(("name", "expected"), [("magnitude", 2.0), ("nonzeros", 2.0), ("momentum", 0.75)])
def test_what_redistributions_share_by(name, expected):
    assert redistribution[name](torch.tensor([1.0, -3.0]), momentum=torch.tensor([-0.5, 1.0])) == expected


def test_the_lowest_are_dropped_and_the_highest_grown():
    mask = torch.tensor([[True, False, True], [True, True, False]])
    scores = torch.tensor([3.0, 1.0, 2.0, 0.5])  # of the four active ones
    assert dropped(mask, scores, 2).tolist() == [[True, False, False], [True, False, False]]
    assert dropped(mask, torch.full((4,), torch.inf), 2).equal(mask)
    more = grown(mask, torch.tensor([[9.0, 1.0, 9.0], [9.0, 9.0, 2.0]]), 1)
    assert more.tolist() == [[True, False, True], [True, True, True]]


@pytest.mark.parametrize("seed", range(200))
def test_counts_are_exact_in_any_case(seed):
    mask = torch.rand(7, 9, generator=rng(seed)) < 0.4
    scores = torch.randint(3, (7, 9), generator=rng(seed)).float()
    count = int(torch.randint(int(mask.sum()) + 1, (), generator=rng(seed)))
    fewer = dropped(mask, scores[mask], count)
    assert fewer.sum() == mask.sum() - count and not (fewer & ~mask).any()
    again = grown(fewer, scores, count)
    assert again.sum() == mask.sum() and (again | fewer).equal(again)


def test_fractions_fall_to_zero():
    assert [drop_fraction(0.5, p, "cosine") for p in (0, 1)] == [0.5, 0.0]
    assert [drop_fraction(0.5, p, "linear") for p in (0, 1)] == [0.5, 0.0]


@pytest.mark.parametrize("drop", ["magnitude", "set", "threshold"])
@pytest.mark.parametrize("growth", ["random", "gradient", "momentum"])
@pytest.mark.parametrize("redistribution", [None, "magnitude", "nonzeros", "momentum"])
def test_every_change_keeps_the_counts(drop, growth, redistribution):
    hooks = sparse(drop=drop, growth=growth, redistribution=redistribution)
    fit(run(*hooks))
    counts = counts_over_time(hooks[0])
    assert len(counts) == 1 + 7  # steps 4, 8, … 28
    assert len({sum(layers) for layers in counts}) == 1
    if redistribution is None:
        assert all(layers == counts[0] for layers in counts)


def test_rigl_grows_where_the_raw_gradient_is_largest():
    class Twin(Hook):
        """Computes the change in the step of its own, from the state before."""

        def __init__(self):
            self.expected = None

        def on_gradients(self, run):
            if run.step == 4:
                self.expected = {}
                for name, mask in hooks[0].masks.items():
                    weight = run.model.get_parameter(name)
                    keep = mask.clone()
                    count = int(drop_fraction(0.5, run.progress, "cosine") * int(mask.sum()))
                    order = sorted(mask.nonzero().tolist(), key=lambda at: abs(weight[tuple(at)].item()))
                    for at in order[:count]:
                        keep[tuple(at)] = False
                    order = sorted((~keep).nonzero().tolist(), key=lambda at: -abs(weight.grad[tuple(at)].item()))
                    for at in order[:count]:
                        keep[tuple(at)] = True
                    self.expected[name] = keep
            if run.step == 5:
                assert all(mask.equal(self.expected[name]) for name, mask in hooks[1].masks.items())
                self.seen = True

    hooks = [None, *sparse(growth="gradient", drop="magnitude")]
    twin = Twin()
    hooks[0] = hooks[1]
    fit(run(twin, *hooks[1:]))
    assert twin.seen


def test_a_full_layer_does_not_change():
    hooks = sparse(density=1.0, growth="gradient")
    dense, full = fit(run()), fit(run(*hooks))
    assert all(torch.equal(a, b) for a, b in zip(dense.model.parameters(), full.model.parameters(), strict=True))


def test_weights_that_are_not_trained_are_left_alone():
    model = network()
    frozen = next(name for name, p in model.named_parameters() if p.dim() > 1)
    model.get_parameter(frozen).requires_grad_(False)
    before = model.get_parameter(frozen).clone()
    topology, _ = sparse(growth="gradient")
    corrected = sparse(correction=[Correction(AgentOptions())], growth="gradient")
    for hooks in (corrected, [topology, Active(topology.masks, topology.due)]):
        trained = fit(run(*hooks, model=copy.deepcopy(model)))
        assert frozen not in hooks[0].masks and trained.model.get_parameter(frozen).equal(before)


class Partly(nn.Module):
    """Has a layer that it does not use."""

    def __init__(self):
        super().__init__()
        self.idle, self.hidden, self.head = nn.Linear(D, 8), nn.Linear(D, 8), nn.Linear(8, C)

    def forward(self, x):
        return self.head(self.hidden(x).relu())


@pytest.mark.parametrize(
    "settings",
    [
        {"growth": "gradient"},
        {"growth": "momentum", "redistribution": "momentum"},
        {"growth": "gradient", "sparse_init": "snip"},
        {"growth": "gradient", "sparse_init": "grasp"},
    ],
)
def test_a_layer_out_of_use_has_no_gradient(settings):
    hooks = sparse(correction=[Correction(AgentOptions(gamma=0.5))], **settings)
    fit(run(*hooks, model=Partly()))
    assert len({sum(layers) for layers in counts_over_time(hooks[0])}) == 1 and hooks[1].c


def test_without_growth_masks_stay():
    hooks = sparse(growth=None)
    fit(run(*hooks))
    assert len(counts_over_time(hooks[0])) == 1 and hooks[0].explored_share == density_of(hooks[0].masks)


def test_gradual_pruning_ends_at_its_density():
    hooks = sparse(growth=None, sparse_init="dense", update_every_steps=1)
    trained = fit(run(*hooks))
    totals = [sum(layers) for layers in counts_over_time(hooks[0])]
    assert totals == sorted(totals, reverse=True) and totals[0] == sum(m.numel() for m in hooks[0].masks.values())
    assert totals[-1] == round(0.3 * totals[0])
    assert sum(int((p != 0).sum()) for p in trained.model.parameters() if p.dim() > 1) <= totals[-1]


def test_the_explored_share_is_that_of_the_union():
    union = {}

    class Gather(Hook):
        def on_step(self, run):
            for name, mask in hooks[0].masks.items():
                union[name] = union.get(name, mask) | mask

    hooks = sparse()
    fit(run(*hooks, Gather()))
    assert hooks[0].explored_share == density_of(union) > density_of(hooks[0].masks)


@pytest.mark.parametrize(
    "settings",
    [
        {"growth": "gradient"},
        {"growth": "momentum", "redistribution": "momentum"},
        {"sparse_init": "snip", "fan_in": "sparse"},
    ],
)
@pytest.mark.parametrize("every", [4, 6])  # between epochs of 6 steps, and at their ends
@pytest.mark.parametrize("agent", [{}, {"snapshot_every_steps": 4}])
def test_stopped_and_resumed_equals_never_stopped(tmp_path, settings, every, agent):
    def training():
        correction = Correction(AgentOptions(always=True, gamma=0.5, **agent))
        hooks = sparse(correction=[correction], update_every_steps=every, **settings)
        return run(*hooks), hooks[0], correction

    whole, topology, correction = training()
    fit(whole)
    places = StoredCheckpoints(Storage(str(tmp_path)))
    first, *_ = training()
    first.last = 2
    fit(first, checkpoints=places)
    second, again, corrected = training()
    fit(second, checkpoints=places)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))
    assert all(mask.equal(again.masks[name]) for name, mask in topology.masks.items())
    assert again.history == topology.history and corrected.c == correction.c
    assert len(corrected.history) == len(correction.history) == STEPS


def test_too_few_weights_for_the_layers():
    with pytest.raises(UserError, match=r"density = 0.001 of 344 weights leaves 0 for 3 layers"):
        fit(run(*sparse(density=0.001)))


def test_without_weights_to_mask_a_density_is_refused():
    model = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Linear(8, C))
    model[0].weight.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    with pytest.raises(UserError, match="the model trains no weights of linear or convolutional layers"):
        fit(run(*sparse(), model=model))


def test_divergence_is_said_where_it_shows_first():
    wild = PLAIN.model_copy(update={"lr": 1e30})
    with pytest.raises(UserError, match="lower the learning rate"):
        fit(run(*sparse(redistribution="magnitude", update_every_steps=2), settings=wild))


@pytest.mark.parametrize(
    ("kind", "rule", "message"),
    [
        ("drop", lambda weight: weight[:1], r"drop rule 'mine' returned shape \[1\] for \[\d+\] of"),
        ("drop", lambda weight: None, r"drop rule 'mine' returned shape None for"),
        ("growth", lambda weight, *, gradient: gradient / 0 * 0, "growth rule 'mine' returned NaN for"),
        ("redistribution", lambda weight: float("nan"), "redistribution 'mine' returned nan for"),
        ("redistribution", lambda weight: -1, "redistribution 'mine' returned -1 for"),
        ("sparse_init", lambda model, density: {}, "sparse initialisation 'mine' returned other layers"),
    ],
)
def test_what_a_rule_of_the_users_returns_is_looked_at(monkeypatch, kind, rule, message):
    registry = {"drop": drop, "growth": growth, "redistribution": redistribution, "sparse_init": initial}[kind]
    monkeypatch.setitem(registry._entries, "mine", registry._entry("mine", rule, ""))
    with pytest.raises(UserError, match=message):
        fit(run(*sparse(**{kind: "mine"})))


def test_a_growth_rule_of_the_wrong_shape_is_told():
    with pytest.raises(UserError, match=r"growth rule .*test_topology:flat. returned shape \[3\] for \[16, 12\]"):
        fit(run(*sparse(growth=f"{__name__}:flat")))


def flat(weight):
    return torch.zeros(3)

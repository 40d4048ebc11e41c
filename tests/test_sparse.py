"""Sparse training against hand tables, closed forms and loops written out."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from raypkg.core.errors import UserError
from raypkg.core.settings import Training
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.batches import Batches
from raypkg.engine.costs import Cost
from raypkg.engine.loop import fit
from raypkg.engine.run import Hook, Run
from raypkg.engine.worker import Worker
from raypkg.methods.agent.control_variate import coefficient, cosine_similarity, smoothed
from raypkg.methods.agent.hook import Correction
from raypkg.methods.agent.settings import Agent
from raypkg.methods.sparse.active_linear import ActiveLinear, of_active, pattern_of
from raypkg.methods.sparse.csr import compressed, exchange_linear, expanded
from raypkg.methods.sparse.flops import active_flops, forward_flops
from raypkg.methods.sparse.hook import Topology
from raypkg.methods.sparse.masked import Active, Masked
from raypkg.methods.sparse.masks import allot, counts_of, density_of, enlarged, erk, largest_masks, shapes_of
from raypkg.methods.sparse.rules import drop, growth, initial, redistribution
from raypkg.methods.sparse.saliency import grasp, snip
from raypkg.methods.sparse.settings import Sparsity
from raypkg.methods.sparse.topology import drop_fraction, dropped, grown
from raypkg.models import build_model
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage

N, D, C = 96, 12, 3
PLAIN = Training(epochs=5, batch_size=16, lr=0.1, precision="float32", schedule="constant", weight_decay=0)
STEPS = 30


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def split():
    y = torch.arange(N) % C
    return Split.from_tensors(torch.randn(N, D, generator=rng()) + 2 * F.one_hot(y, D), y)


def network():
    return build_model("mlp", (D,), C, seed=0, options={"hidden": [16, 8]})


def run(*hooks, settings=PLAIN, model=None):
    everyone = Coreset.uniform(torch.arange(N))
    return Run(model or network(), split(), everyone, settings, 0, "train", Worker(), (), Cost("train"), hooks)


def sparse(*after, correction=(), **settings):
    topology = Topology(Sparsity(**{"density": 0.3, "update_every": 4, **settings}), STEPS)
    return [topology, *correction, Masked(topology.masks), *after]


# Rules


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
    gradient, momentum = torch.tensor([[-3.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, -4.0], [0.0, 2.0]])
    scores = growth[name](torch.zeros(2, 2), gradient=gradient, momentum=momentum, rng=rng())
    assert torch.equal(scores, torch.tensor(expected))


def test_random_growth_is_a_function_of_its_generator():
    first, again, other = (growth["random"](torch.zeros(5, 5), rng=rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


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
    mask, scores = torch.rand(7, 9, generator=rng(seed)) < 0.4, torch.randint(3, (7, 9), generator=rng(seed)).float()
    count = int(torch.randint(int(mask.sum()) + 1, (), generator=rng(seed)))
    fewer = dropped(mask, scores[mask], count)
    assert fewer.sum() == mask.sum() - count and not (fewer & ~mask).any()
    again = grown(fewer, scores, count)
    assert again.sum() == mask.sum() and (again | fewer).equal(again)


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
    expected = {name: d * shapes[name].numel() for name, d in erk(shapes, density).items()}
    counts = counts_of(shapes, erk(shapes, density))
    assert all(abs(counts[name] - expected[name]) < 1 for name in shapes)
    assert sum(counts.values()) == round(density * sum(shape.numel() for shape in shapes.values()))
    assert all(count <= shapes[name].numel() for name, count in counts.items())


def batch():
    data = split()
    x, y = data.batch(torch.arange(32))
    return (x - torch.tensor(data.mean)) / torch.tensor(data.std), y


def test_saliencies_equal_their_definitions_and_leave_the_model_alone():
    model = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, C)).double()
    before, (x, y) = copy.deepcopy(model.state_dict()), batch()
    for name, value in grasp(model, x.double(), y).items():
        torch.testing.assert_close(value, reference.grasp(model, x.double(), y)[name], rtol=1e-6, atol=1e-10)
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    for name, value in snip(model, x.double(), y).items():
        twin = copy.deepcopy(model).train()
        F.cross_entropy(twin(x.double()), y).backward()
        torch.testing.assert_close(value, (twin.get_parameter(name).grad * weights[name]).abs())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_largest_masks_have_the_total_but_no_empty_layer():
    scores = {"a": torch.arange(50.0) + 10, "b": torch.arange(5.0)}
    masks = largest_masks(scores, 0.2)
    assert masks["a"].sum() == 11 and masks["b"].tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("name", sorted(initial.entries))
def test_first_masks_have_their_density(name):
    masks = initial[name](network(), 0.3, rng=rng(), batch=batch())
    total = sum(mask.numel() for mask in masks.values())
    assert density_of(masks) == (1.0 if name == "dense" else round(0.3 * total) / total)


def test_fractions_fall_to_zero():
    assert [drop_fraction(0.5, p, "cosine") for p in (0, 1)] == [0.5, 0.0]
    assert [drop_fraction(0.5, p, "linear") for p in (0, 1)] == [0.5, 0.0]


# The hook


def active(hook):
    """The number of active weights by layer after each change."""
    layers, counts = len(hook.masks), [row["active"] for row in hook.history]
    return [counts[i : i + layers] for i in range(0, len(counts), layers)]


@pytest.mark.parametrize("drop", ["magnitude", "set", "threshold"])
@pytest.mark.parametrize("growth", ["random", "gradient", "momentum"])
@pytest.mark.parametrize("redistribution", ["none", "magnitude", "nonzeros", "momentum"])
def test_every_change_keeps_the_counts(drop, growth, redistribution):
    hooks = sparse(drop=drop, growth=growth, redistribution=redistribution)
    fit(run(*hooks))
    counts = active(hooks[0])
    assert len(counts) == 1 + 7  # steps 4, 8, … 28
    assert len({sum(layers) for layers in counts}) == 1
    if redistribution == "none":
        assert all(layers == counts[0] for layers in counts)


class Watch(Hook):
    """Looks at the weights that each change brought, before the optimiser moves them."""

    def __init__(self, topology, settings):
        self.topology, self.masks, self.settings, self.changes = topology, {}, settings, 0

    def on_gradients(self, run):
        for name, mask in self.topology.masks.items():
            weight, before = run.model.get_parameter(name), self.masks.get(name, mask)
            new = mask & ~before
            self.changes += int(new.sum())
            assert not weight[new].any() and not weight[~mask].any()
            for key, value in run.optimizer.state[weight].items():
                if value.shape == weight.shape:
                    assert not value[~mask].any()
                    expected = value[mask & before].mean() if key == "exp_avg_sq" else torch.tensor(0.0)
                    assert torch.allclose(value[new], expected, rtol=1e-6)
            self.masks[name] = mask.clone()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_is_new_starts_at_zero_and_what_is_gone_stays_there(optimizer):
    hooks = sparse()
    watch = Watch(hooks[0], PLAIN)
    trained = fit(run(*hooks, watch, settings=PLAIN.model_copy(update={"optimizer": optimizer, "weight_decay": 0.1})))
    assert watch.changes > 0
    assert all(not trained.model.get_parameter(name)[~mask].any() for name, mask in hooks[0].masks.items())


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
    active = sparse(growth="gradient")[:1]
    for hooks in (sparse(correction=[Correction(Agent())], growth="gradient"), [*active, Active(active[0])]):
        trained = fit(run(*hooks, model=copy.deepcopy(model)))
        assert frozen not in hooks[0].masks and trained.model.get_parameter(frozen).equal(before)


def test_too_few_weights_for_the_layers():
    with pytest.raises(UserError, match=r"density = 0.001 of 344 weights leaves 0 for 3 layers"):
        fit(run(*sparse(density=0.001)))


class Attentive(nn.Module):
    """Drops units where no layer of its own says so."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(D, 1, dropout=0.5), nn.Linear(D, C)

    def forward(self, x):
        return self.head(x + self.attention(x[None], x[None], x[None])[0][0])


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.5), nn.Linear(8, C)), Attentive()],
    ids=["dropout", "attention"],
)
def test_a_model_that_draws_is_no_control_variate(model):
    with pytest.raises(UserError, match="correction = agent: the model gives one batch two outputs"):
        fit(run(Correction(Agent()), model=model))


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
    hooks = sparse(correction=[Correction(Agent(gamma=0.5))], **settings)
    fit(run(*hooks, model=Partly()))
    assert len({sum(layers) for layers in active(hooks[0])}) == 1 and hooks[1].c


def test_without_weights_to_mask_a_density_is_refused():
    model = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Linear(8, C))
    model[0].weight.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    with pytest.raises(UserError, match="the model trains no weights of linear or convolutional layers"):
        fit(run(*sparse(), model=model))


def test_divergence_is_said_where_it_shows_first():
    wild = PLAIN.model_copy(update={"lr": 1e30})
    with pytest.raises(UserError, match="lower the learning rate"):
        fit(run(*sparse(redistribution="magnitude", update_every=2), settings=wild))


@pytest.mark.parametrize(
    ("kind", "rule", "message"),
    [
        ("drop", lambda weight: weight[:1], r"drop rule 'mine' returned \[1\] for \[\d+\] of"),
        ("drop", lambda weight: None, r"drop rule 'mine' returned a NoneType for"),
        ("growth", lambda weight, *, gradient: gradient / 0 * 0, "growth rule 'mine' returned NaN for"),
        ("redistribution", lambda weight: float("nan"), "redistribution 'mine' returned nan for"),
        ("redistribution", lambda weight: -1, "redistribution 'mine' returned -1 for"),
        ("sparse_init", lambda model, density: {}, "sparse initialisation 'mine' returned other layers"),
    ],
)
def test_what_a_rule_of_the_users_returns_is_looked_at(monkeypatch, kind, rule, message):
    registry = {"drop": drop, "growth": growth, "redistribution": redistribution, "sparse_init": initial}[kind]
    monkeypatch.setitem(registry.entries, "mine", registry._entry("mine", rule, ""))
    with pytest.raises(UserError, match=message):
        fit(run(*sparse(**{kind: "mine"})))


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

    suited, plain = (sparse(growth="none", density=0.05, fan_in=inputs) for inputs in ("sparse", "dense"))
    assert 0.2 < size(*suited) / size() < 5 and size(*plain) / size() < 0.01


def test_without_growth_masks_stay():
    hooks = sparse(growth="none")
    fit(run(*hooks))
    assert len(active(hooks[0])) == 1 and hooks[0].explored_share == density_of(hooks[0].masks)


def test_gradual_pruning_ends_at_its_density():
    hooks = sparse(growth="none", sparse_init="dense", update_every=1)
    trained = fit(run(*hooks))
    totals = [sum(layers) for layers in active(hooks[0])]
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
@pytest.mark.parametrize("agent", [{}, {"snapshot": 4}])
def test_stopped_and_resumed_equals_never_stopped(tmp_path, settings, every, agent):
    def training():
        correction = Correction(Agent(gamma=0.5, **agent))
        hooks = sparse(correction=[correction], update_every=every, **settings)
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


# AGENT


def test_c_is_the_ratio_of_covariance_and_variance():
    a, b = torch.randn(2, 30, generator=rng())
    assert coefficient(a, b) == pytest.approx(np.cov(a, b)[0, 1] / np.var(b.numpy(), ddof=1), rel=1e-6)
    assert coefficient(a, torch.ones(30)) == 0.0
    assert smoothed(1.0, 3.0, 0.25) == 1.5


def test_c_comes_from_the_losses_of_model_and_snapshot():
    found = []

    class Losses(Hook):
        def on_gradients(self, run):
            x, y = run.batch.x, run.batch.y
            found.append([F.cross_entropy(model(x), y).item() for model in (run.model, hook.snapshot)])

    hook = Correction(Agent(gamma=0.5))
    fit(run(Losses(), hook, settings=PLAIN.model_copy(update={"epochs": 2})))
    model, snapshot = np.array(found[:6]).T
    expected = 0.3 * np.cov(np.diff(model), np.diff(snapshot))[0, 1] / np.var(np.diff(snapshot), ddof=1)
    assert hook.c == pytest.approx(expected, rel=1e-4)


def test_drift_does_not_pass_for_covariance():
    """Losses that fall along the way: differences find the batches' covariance, the plain ratio does not."""
    snapshot, noise = torch.randn(2, 500, generator=rng())
    current = 0.7 * snapshot + 0.1 * noise + torch.linspace(0, 50, 500)
    assert coefficient(current.diff(), snapshot.diff()) == pytest.approx(0.7, abs=0.05)
    assert abs(coefficient(current, snapshot) - 0.7) > 0.2


def test_without_a_weight_nothing_changes_bit_for_bit():
    model = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, C))
    plain, with_it = (
        fit(run(*sparse(correction=hooks), model=copy.deepcopy(model)))
        for hooks in ([], [Correction(Agent(alpha=0.0))])
    )
    for name, value in plain.model.state_dict().items():
        assert value.equal(with_it.model.state_dict()[name]), name


@pytest.mark.parametrize("damped", [0.3, 1.0])
def test_it_equals_the_loop_written_out(damped):
    settings = PLAIN.model_copy(update={"precision": "float64", "momentum": 0.0, "nesterov": False})
    hook, model = Correction(Agent(gamma=damped, alpha=0.0)), network().double()
    hook.c = 1.0
    twin = copy.deepcopy(model)

    def batches(epoch):
        stream = Batches(
            split(), Coreset.uniform(torch.arange(N)), 16, seed=0, augment=(), worker=Worker(), dtype=torch.float64
        )
        return [(batch.x, batch.y) for batch in stream.epoch(epoch)]

    trained = fit(run(hook, settings=settings, model=model))
    reference.corrected_sgd(twin, batches, 0.1, damped, epochs=5)
    for ours, theirs in zip(trained.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_near_the_snapshot_svrg_has_less_variance():
    """γc = 1: right after a snapshot every corrected gradient is the full one."""
    found = {}

    class Variance(Hook):
        def __init__(self, name):
            self.name = name

        def on_gradients(self, run):
            gradient = torch.cat([p.grad.flatten() for p in run.model.parameters()])
            found.setdefault(self.name, []).append(gradient.clone())

    hook = Correction(Agent(gamma=1.0, alpha=0.0))
    hook.c = 1.0
    slow = PLAIN.model_copy(update={"epochs": 1, "lr": 1e-4})
    fit(run(Variance("raw"), hook, Variance("corrected"), settings=slow))
    raw, corrected = (torch.stack(found[name]).var(0).sum() for name in ("raw", "corrected"))
    assert corrected < 1e-3 * raw


def test_gradients_are_counted_where_they_are_computed():
    hook = Correction(Agent(gamma=0.5, samples=32, every=2))
    trained = fit(run(hook))
    steps = trained.bill("correction")
    assert (steps.forward, steps.backward) == (N // 2 * 5, N // 2 * 4)  # none in the first epoch, while c = 0
    assert trained.bill("full gradient").backward == 32 * 4
    assert [row[0] for row in hook.history] == list(range(0, STEPS, 2))


@pytest.mark.parametrize("every", [1, 2])
def test_kept_gradients_are_those_that_would_be_computed_again(every):
    kept, again = (Correction(Agent(gamma=0.5, memory=memory, every=every)) for memory in (None, 0))
    one, other = fit(run(*sparse(correction=[kept]))), fit(run(*sparse(correction=[again])))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    np.testing.assert_array_equal(kept.history, again.history)
    assert list(kept.kept) == list(range(STEPS - STEPS // 5, STEPS, every)) and not again.kept
    assert one.bill("correction").backward == 0 and one.bill("full gradient").backward == 4 * N
    assert other.bill("correction").backward == 4 * N // every


def test_batches_that_another_hook_supplies_keep_no_gradients():
    class Supplier(Hook):
        def batches(self, run):
            return None

    hook = Correction(Agent(gamma=0.5))
    fit(run(hook, Supplier()))
    assert hook.full and not hook.kept


def test_cosine():
    a, b = [torch.tensor([3.0, 0.0]), torch.tensor([0.0])], [torch.tensor([0.0, 4.0]), torch.tensor([0.0])]
    assert (
        cosine_similarity(a, a),
        cosine_similarity(a, b),
        cosine_similarity(a, [torch.zeros(2), torch.zeros(1)]),
    ) == (1.0, 0.0, 0.0)


# What it saves


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
        torch.testing.assert_close(exchange_linear(model, of_active)(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), ()])
@pytest.mark.parametrize(("only", "whole"), [(True, False), (False, False), (False, True)])
def test_active_layers_have_the_gradients_of_masked_ones(only, whole, shape):
    masked, mask = nn.Linear(9, 7), torch.rand(7, 9, generator=rng()) < 0.3
    masked.weight.data *= mask
    sparse_layer = ActiveLinear(copy.deepcopy(masked))
    pattern = pattern_of(mask)
    sparse_layer.pattern, sparse_layer.whole_gradient = pattern, whole
    if only:
        sparse_layer.weight.data = pattern.values(masked.weight.data)
    x = torch.randn(*shape, 9, generator=rng())
    gradients = []
    for layer in (masked, sparse_layer):
        inputs = x.clone().requires_grad_()
        layer(inputs).square().sum().backward()
        gradients.append((inputs.grad, layer.weight.grad, layer.bias.grad))
    if only:
        gradients[1] = (gradients[1][0], pattern.whole(gradients[1][1]), gradients[1][2])
    expected = (gradients[0][0], gradients[0][1] * (1 if whole else mask), gradients[0][2])
    for ours, theirs in zip(gradients[1], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "settings",
    [
        {"growth": "random"},
        {"growth": "gradient"},
        {"growth": "gradient", "update_every": 1},
        {"growth": "random", "update_every": 6},  # the steps of an epoch
        {"growth": "random", "redistribution": "magnitude"},
        {"growth": "none", "sparse_init": "dense"},
    ],
)
def test_computing_sparse_trains_the_same_model(settings, optimizer, tmp_path):
    # In float64 no order of magnitudes hangs on rounding.
    precise = PLAIN.model_copy(
        update={"precision": "float64", "weight_decay": 1e-3, "optimizer": optimizer, "lr": 0.02}
    )

    def training(compute):
        hooks = sparse(**settings)
        return run(hooks[0], compute(hooks), settings=precise)

    one, other = fit(training(lambda hooks: hooks[1])), fit(training(lambda hooks: Active(hooks[0])))
    assert all(mask.equal(other.hooks[0].masks[name]) for name, mask in one.hooks[0].masks.items())
    for ours, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert set(one.model.state_dict()) == set(other.model.state_dict())

    places, stopped = StoredCheckpoints(Storage(str(tmp_path))), training(lambda hooks: Active(hooks[0]))
    stopped.last = 2
    fit(stopped, checkpoints=places)
    resumed = fit(training(lambda hooks: Active(hooks[0])), checkpoints=places)
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), resumed.model.parameters(), strict=True))


def test_computing_sparse_holds_only_the_weights_that_exist():
    hooks = sparse(growth="gradient")[:1]
    held = []

    class Watch(Hook):
        def on_gradients(self, run):
            held.append({p.dim() for name, p in run.model.named_parameters() if name in hooks[0].masks})

    fit(run(*hooks, Active(hooks[0]), Watch()))
    assert held == [{2} if hooks[0].due(step) else {1} for step in range(STEPS)]


def test_a_growth_rule_of_the_wrong_shape_is_told():
    with pytest.raises(UserError, match=r"growth rule .*test_sparse:flat. returned \[3\] for \[16, 12\]"):
        fit(run(*sparse(growth=f"{__name__}:flat")))


def flat(weight):
    return torch.zeros(3)

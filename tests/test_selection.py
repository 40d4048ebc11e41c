import sys

import pytest
import torch

import reference
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import Select, Training
from raypkg.coresets.budgets import class_budgets, select, select_class
from raypkg.coresets.gradients import HeadView, head_view
from raypkg.coresets.record import Record
from raypkg.coresets.rules import coreset
from raypkg.coresets.rules.matching import safe_rate, steepest
from raypkg.coresets.sharded import LiveModel, select_coreset
from raypkg.coresets.solvers import largest
from raypkg.data import Data, load_data
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.batches import plain_batches
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.engine.shards import WorkerShards, class_shards
from raypkg.models import build_model

BY_CLASS = [name for name, entry in coreset.entries.items() if entry.sees == "gradients" and entry.by_class]


def ints(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    "counts, budget, expected",
    [
        ([10, 10, 10], 7, [3, 2, 2]),  # a tie goes to the lower class
        ([50, 30, 20], 7, [4, 2, 1]),  # 3.5, 2.1, 1.4: the largest remainder gets the last one
        ([97, 2, 1], 10, [8, 1, 1]),  # 9.7, 0.2, 0.1: none goes without
        ([97, 2, 1], 2, [2, 0, 0]),  # the budget does not reach all
        ([3, 0, 1], 4, [3, 0, 1]),
    ],
)
def test_class_budgets_by_hand(counts, budget, expected):
    assert class_budgets(ints(*counts), budget).tolist() == expected


def test_class_budgets_over_every_budget():
    counts = ints(1, 0, 7, 40, 3, 1)
    for budget in range(1, 53):
        shares = class_budgets(counts, budget)
        assert shares.sum() == budget and (shares <= counts).all() and (shares >= 0).all()
        assert budget < 5 or shares.count_nonzero() == 5


@pytest.mark.parametrize(
    "indices, weights, message",
    [
        (ints(5, 1, 5), torch.ones(3), "index 5: must be given once"),
        (ints(0, 1), torch.tensor([1.0, -0.5]), "weight -0.5: must be finite and 0 or more"),
        (torch.zeros(1), torch.ones(1), r"indices are torch.float32 \[1\], expected torch.int64 \[k\]"),
    ],
)
def test_coreset_is_validated(indices, weights, message):
    with pytest.raises(UserError, match=message):
        Coreset(indices, weights)


@pytest.mark.parametrize("name", BY_CLASS)
def test_classes_are_picked_alike_in_one_view_or_in_several(name):
    view, valid = reference.problem(80).view, reference.problem(30).view
    together = select(view, 20, name, seed=4, target=valid)
    apart = []
    for label, share in enumerate(class_budgets(view.y.bincount(), 20).tolist()):
        members = (view.y == label).nonzero()[:, 0]
        holder = HeadView(view.logits[members], view.features[members], view.y[members])
        same = valid[valid.y == label]
        part = select_class(holder, share, coreset[name], seed=4, label=label, options={}, target=same)
        apart.append(part.at(members))
    apart = Coreset.concat(apart)
    assert together.indices.equal(apart.indices) and together.weights.equal(apart.weights)


def test_an_empty_class_and_one_without_budget_are_skipped():
    view = HeadView(torch.zeros(6, 4), torch.ones(6, 2), ints(0, 0, 0, 2, 2, 3))
    assert select(view, 2, "grand", seed=0).indices.tolist() == [0, 3]


def test_a_class_without_validation_samples_is_its_own_validation():
    train, valid = reference.problem(40), reference.problem(20).view
    without = valid[valid.y != 1]
    members = (train.y == 1).nonzero()[:, 0]
    share = int(class_budgets(train.y.bincount(), 12)[1])
    expected = coreset["glister"](train.view[members], share)
    picked = select(train.view, 12, "glister", seed=0, target=without).indices
    assert picked[train.y[picked] == 1].equal(members[expected.indices])


def short(view, budget):
    return Coreset.uniform(torch.arange(budget - 1))


def failing(view, k):
    raise ZeroDivisionError("of mine")


def misshapen(view, budget, seed):
    """Take one thing too many."""


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("gradmach", {}, "unknown coreset rule 'gradmach', did you mean 'gradmatch'"),
        ("gradmatch", {"lamda": 1}, "unknown gradmatch option 'lamda', did you mean 'lam'"),
        ("grand", {"gradients": "full"}, "grand option gradients = full: only a selection by a model"),
        ("test_selection:short", {}, "short' must return a Coreset of 5 .*, not Coreset of 4, largest index 3"),
        ("test_selection:failing", {}, r"test_selection\.py, line \d+, in failing: ZeroDivisionError: of mine"),
        ("test_selection:misshapen", {}, r"misshapen' takes .*: it must be \(samples, budget, \*, …\)"),
    ],
)
def test_a_rule_that_does_not_fit_is_named(rule, options, message):
    with pytest.raises(UserError, match=message):
        select(reference.problem(40).view, 5, rule, seed=0, options=options, balanced=False)


OWN = """
from raypkg.coresets.record import Record
from raypkg.coresets.rules import coreset
from raypkg.coresets.rules.matching import safe_rate
from raypkg.data.coreset import Coreset

def by_views(view, budget):
    return Coreset.uniform(view.norms().argsort()[:budget])

def by_losses(record: Record, budget):
    return Coreset.uniform(record.losses.argsort()[:budget])

def half(view):
    return Coreset.uniform(view.norms().argsort()[: len(view) // 2])

@coreset("declared", sees="record", sizes_itself=True)
def declared(seen):
    return Coreset.uniform(seen.losses.argsort()[: len(seen) // 2])
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Methods of the user's own, in a module that no registry scans."""
    (tmp_path / "own_rules.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_rules", None)
    coreset._entries.pop("declared", None)


@pytest.mark.parametrize(
    ("name", "sees", "sizes_itself"),
    [
        ("by_views", "gradients", False),
        ("by_losses", "record", False),
        ("half", "gradients", True),
        ("declared", "record", True),
    ],
)
def test_a_rule_of_the_users_own_is_described_by_its_signature_or_its_decorator(own, name, sees, sizes_itself):
    rule = coreset[f"own_rules:{name}"]
    assert (rule.sees, rule.sizes_itself, rule.source) == (sees, sizes_itself, "user code")
    view = reference.problem(40).view
    samples = view if sees == "gradients" else Record(view.y, view.norms().float())
    picked = select(samples, 40 if sizes_itself else 20, f"own_rules:{name}", seed=0, balanced=False)
    assert picked.indices.equal(view.norms().argsort()[:20])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_classes, width", [(4, 6), (20, 30)])  # M costs less than inner products, or more
def test_gradmatch_equals_its_slow_twin(num_classes, width, seed):
    train, valid = (reference.problem(n, num_classes, width, seed=seed) for n in (40, 15))
    atoms = reference.per_sample_gradients(train).flatten(1)
    for target, mean in [
        (None, atoms.mean(dim=0)),
        (valid.view, reference.per_sample_gradients(valid).mean(0).flatten()),
    ]:
        for options, lam in (({}, 0.5 * float(mean @ mean)), ({"relative": False}, 0.5)):
            slow = reference.matching_pursuit(atoms, mean, 8, lam=lam)
            for normalise, total in ((False, 1), (True, sum(slow.values()))):
                given = {**options, "normalise": normalise}
                picked = coreset["gradmatch"](train.view, 8, target=target, options=given)
                assert weights_of(picked) == pytest.approx({i: 8 * v / total for i, v in slow.items()}, rel=1e-5)


def late(factor):
    """40 samples of class 0 whose errors 1 − p_0 are a factor times 0.2 to 0.5: a later moment of training."""
    wrong = factor * torch.linspace(0.2, 0.5, 40, dtype=torch.float64)
    logits = torch.stack([(1 - wrong).log(), wrong.log()], dim=1)
    features = torch.randn(40, 3, generator=generator(0, "late"), dtype=torch.float64)
    return HeadView(logits, features, torch.zeros(40, dtype=torch.int64))


def test_gradmatch_weights_do_not_vanish_with_the_gradients():
    early, end = late(1.0), late(1e-4)
    matching = {"normalise": False}
    weights = [coreset["gradmatch"](view, 8, options=matching).weights for view in (early, end)]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-4)
    for view in (early, end):
        picked = coreset["gradmatch"](view, 8, options=matching)
        error = view[picked.indices].mean(picked.weights) - view.mean()
        assert error.norm() < 0.1 * view.mean().norm()
    published = coreset["gradmatch"](end, 8, options={**matching, "relative": False})
    assert published.weights.max() < 1e-3


def test_gradmatch_of_equal_gradients():
    view = HeadView(torch.zeros(10, 2), torch.ones(10, 1), ints(*[0] * 10))  # ‖g‖² = ½ · 2
    matched = coreset["gradmatch"](view, 5, options={"normalise": False})
    assert matched.weights.tolist() == pytest.approx([1 / (1 + 0.5 / 5)] * 5)
    assert coreset["gradmatch"](view, 5).weights.tolist() == pytest.approx([1] * 5)
    picked = coreset["gradmatch"](view, 5, options={"lam": 0.0})  # one sample matches the mean exactly
    assert picked.indices.tolist() == [0, 1, 2, 3, 4]
    assert picked.weights.tolist() == pytest.approx([5, 0, 0, 0, 0])


def weights_of(picked):
    return dict(zip(picked.indices.tolist(), picked.weights.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("batch_size, budget", [(5, 20), (5, 18), (7, 21), (7, 39), (16, 3)])  # 40 = 5 · 7 + 5
@pytest.mark.parametrize("num_classes, width", [(4, 6), (40, 60)])
def test_gradmatchpb_equals_its_slow_twin(num_classes, width, seed, batch_size, budget):
    train, valid = (reference.problem(n, num_classes, width, seed=seed) for n in (40, 15))
    batches = torch.randperm(40, generator=generator(seed, "test")).split(batch_size)
    options = {"batch_size": batch_size, "lam": 0.1, "relative": False}
    gradients, aims = (reference.per_sample_gradients(each).flatten(1) for each in (train, valid))
    targets = [(None, None), (valid.view, aims.mean(dim=0))]
    for target, mean in targets[: 1 + (budget > 3)]:  # of 3, none may match another mean
        rng = generator(seed, "test")
        picked = coreset["gradmatchpb"](train.view, budget, rng=rng, target=target, options=options)
        slow = reference.matching_batches(gradients, batches, budget, lam=0.1, target=mean)
        assert weights_of(picked) == pytest.approx(slow, rel=1e-5)


def test_batches_of_gradmatchpb_mix_the_classes_whatever_the_balance():
    view = reference.problem(120).view
    options = {"batch_size": 30}
    by_default, at_once = (
        select(view, 30, "gradmatchpb", seed=0, options=options, balanced=balanced) for balanced in (True, False)
    )
    assert by_default.indices.equal(at_once.indices) and by_default.weights.equal(at_once.weights)
    batch = torch.randperm(120, generator=generator(0, "select", "all")).split(30)
    assert set(by_default.indices.tolist()) in [set(part.tolist()) for part in batch]
    assert not coreset["gradmatchpb"].by_class and not coreset["infobatch"].by_class and coreset["gradmatch"].by_class


@pytest.mark.parametrize("rounds", [1, 3, 20])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_classes, width", [(4, 6), (60, 60)])  # gains from ∇L_val, or some by inner products
def test_glister_as_published_equals_its_slow_twin(num_classes, width, seed, rounds):
    train, valid = (reference.problem(n, num_classes, width, seed=seed) for n in (40, 15))
    options = {"eta": 0.3 * 6 / width, "rounds": rounds}
    for held_out, given in ((valid, valid.view), (train, None)):
        picked = coreset["glister"](train.view, 10, valid=given, options=options).indices
        assert picked.tolist() == reference.glister(train, held_out, 10, **options)


def test_glister_doubles_its_rate_where_that_leads_further():
    train, valid = reference.problem(200, seed=1), reference.problem(100, seed=1)
    gradients = reference.per_sample_gradients(train)
    static = gradients[reference.topk_by_validation(train, valid, 20)].sum(dim=0)
    eta = reference.safe_rate(valid, static)
    once = gradients[reference.glister(train, valid, 20, eta=eta, rounds=8)].sum(dim=0)
    picked = gradients[coreset["glister"](train.view, 20, valid=valid.view).indices].sum(dim=0)
    lowest = [reference.lowest_loss(valid, step) for step in (static, once, picked)]
    assert lowest[0] > lowest[1] + 0.1 and lowest[1] > lowest[2] + 0.1


@pytest.mark.parametrize("seed", range(4))
def test_the_rate_of_glister_equals_its_slow_twin(seed):
    train, valid = reference.problem(40, seed=seed), reference.problem(15, seed=seed)
    static = reference.topk_by_validation(train, valid, 10)
    step = reference.per_sample_gradients(train)[static].sum(dim=0)
    slope = (reference.gradient(valid.head, valid.features, valid.y) * step).sum()
    assert safe_rate(valid.view, valid.view.through(step), slope) == pytest.approx(reference.safe_rate(valid, step))


def alike(n, seed):
    """One class, features around a mean, errors of many sizes: what most of the gains are is told by their bounds."""
    rng = generator(seed, "alike")
    features = 1 + 0.2 * torch.randn(n, 50, generator=rng, dtype=torch.float64)
    logits = torch.randn(n, 50, generator=rng, dtype=torch.float64)
    logits[:, 0] += 6 * torch.rand(n, generator=rng)
    return HeadView(logits, features, torch.zeros(n, dtype=torch.int64))


@pytest.mark.parametrize("k", [1, 5, 24])
@pytest.mark.parametrize("seed", range(3))
def test_the_steepest_samples_are_found_from_few_gains(monkeypatch, seed, k):
    view, valid, left, asked = alike(300, seed), alike(80, seed + 9), torch.arange(0, 300, 2), []
    with monkeypatch.context() as patch:
        inner = HeadView.inner
        patch.setattr(HeadView, "inner", lambda a, b: asked.append(len(a)) or inner(a, b))
        best, gains = steepest(view, left, valid, k)
    every = view.project(valid.mean())[left]
    assert best.equal(left[largest(every, k)])
    torch.testing.assert_close(gains, every.sort(descending=True).values[:k])
    assert 0 < sum(asked) <= 25


def test_glister_returns_the_static_choice_where_no_step_helps():
    view = HeadView(torch.tensor([[2.0, -2.0]] * 6), torch.ones(6, 1), ints(*[0] * 6))
    opposed = HeadView(torch.tensor([[2.0, -2.0]] * 3), torch.ones(3, 1), ints(*[1] * 3))
    assert coreset["glister"](view, 2, valid=opposed).indices.tolist() == [0, 1]


def test_grand_draws_in_proportion_to_the_norms_and_its_weights_are_unbiased():
    view = reference.problem(30).view
    norms, draws, budget = view.norms(), 4000, 6
    times, total = torch.zeros(30), torch.zeros(30)
    for draw in range(draws):
        picked = coreset["grand"](view, budget, rng=generator(0, draw), options={"pick": "drawn"})
        times[picked.indices] += 1
        total[picked.indices] += picked.weights
    expected = budget * norms / norms.sum()
    assert expected.max() < 1  # none is certain here
    torch.testing.assert_close(times / draws, expected.float(), rtol=0, atol=5 * (0.25 / draws) ** 0.5)
    spread = (1 / expected - 1).sqrt() / draws**0.5  # of an estimate whose mean is 1
    mean = total / draws * 30 / budget
    assert ((mean - 1).abs() < 5 * spread).all()


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("holders", [1, 3])
@pytest.mark.parametrize(("name", "gradients"), [("el2n", None), ("grand", "head"), ("grand", "full")])
def test_scores_are_averaged_over_the_models(name, gradients, holders, balanced):
    n, budget = 60, 12
    x, y = torch.randn(n, 5, generator=generator(0, "x")), torch.arange(n) % 3
    split = Split.from_tensors(x, y)
    models = [build_model("mlp", (5,), 3, seed=seed) for seed in range(3)]

    x = split.inputs(split.batch(torch.arange(n))[0])
    scores = []
    for model in models:
        errors = (model(x).softmax(1) - torch.eye(3)[y]).norm(dim=1)
        lengths = (model.features(x).square().sum(1) + 1).sqrt()
        by_name = {None: errors, "head": errors * lengths, "full": reference.full_norms(model, x, y)}
        scores.append(by_name[gradients].detach())
    mean = torch.stack(scores).mean(0)
    groups = [(y == label).nonzero()[:, 0] for label in range(3)] if balanced else [torch.arange(n)]
    expected = torch.cat([group[mean[group].topk(budget // len(groups)).indices] for group in groups])

    shards = WorkerShards(class_shards(Data(split, split), y, torch.arange(n), ints(), holders))
    options = {} if gradients is None else {"gradients": gradients}
    settings = Select(rule=name, fraction=budget / n, balanced=balanced, options=options)
    scorers = [LiveModel(model, "float32") for model in models]
    picked = select_coreset(shards, scorers, settings, Record.empty(y), torch.arange(n), seed=0)
    assert picked.coreset.indices.equal(expected.sort().values)
    passes = 3 * n
    full = passes if gradients == "full" else 0
    assert (picked.cost.forward, picked.cost.backward) == (passes + full, full)


# Views of real samples by a trained model, against the textbook's forms


@pytest.fixture(scope="module")
def digits():
    """What an MLP trained on the digits for two epochs makes of them, in float64."""
    split = load_data("digits").train
    model = build_model("mlp", split.shape, split.num_classes, seed=0)
    training = Training(epochs=2, precision="float32")
    fit(Run.simple(model, split, training, augment=()))
    everyone = torch.arange(len(split))
    view = head_view(model, plain_batches(split, everyone, torch.device("cpu")))
    head = torch.cat([model.head.weight, model.head.bias[:, None]], dim=1).detach().double()
    return reference.Problem(head, view.features.double(), view.y)


@pytest.fixture(scope="module")
def halves(digits):
    """Half of the digits to select from, the gradients of those, and the other half."""
    mine, theirs = (reference.Problem(digits.head, digits.features[i::2], digits.y[i::2]) for i in (0, 1))
    return mine, reference.per_sample_gradients(mine), theirs


@pytest.mark.parametrize("budget", [14, 72, 215])  # 2, 10 and 30 %
def test_glister_leads_at_least_as_far_as_its_textbook_forms_among_all_classes(halves, budget):
    train, gradients, valid = halves
    picked = select_class(train.view, budget, coreset["glister"], seed=0, label="all", options={}, target=valid.view)
    gain = (gradients * reference.gradient(valid.head, valid.features, valid.y)).sum(dim=(1, 2))
    textbook = {
        "DeepCore": gain.topk(budget).indices,
        "CORDS": reference.taylor_greedy(gradients, train.head, valid, budget),
    }
    lowest = {name: reference.lowest_loss(valid, gradients[chosen].sum(dim=0)) for name, chosen in textbook.items()}
    assert reference.lowest_loss(valid, gradients[picked.indices].sum(dim=0)) < min(lowest.values())


@pytest.mark.parametrize("batches", [2, 4, 8])
def test_gradmatchpb_matches_at_least_as_well_as_its_textbook_form(halves, batches):
    train, gradients, _ = halves
    rows = gradients.flatten(1)
    target = rows.mean(dim=0)
    drawn = torch.randperm(len(rows), generator=generator(0, "select", "all")).split(32)
    means = torch.stack([rows[batch].mean(dim=0) for batch in drawn])
    textbook = reference.plain_pursuit(means, target, batches)
    picked = select(train.view, 32 * batches, "gradmatchpb", seed=0)
    matched = picked.weights.double() @ rows[picked.indices] / len(picked)
    assert float((matched - target).square().sum()) <= textbook * (1 + 1e-6)

"""Rules that cover the samples or judge each by itself, and the margins that a training records."""

import math

import pytest
import torch
from torch.nn import functional as F

import reference
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import Training
from raypkg.coresets.budgets import class_budgets, select
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.record import Record, Recorder, margins_of
from raypkg.coresets.rules import coreset
from raypkg.coresets.rules.matching import geometric_median
from raypkg.data import load_data
from raypkg.engine.loop import fit
from raypkg.engine.run import Hook, Run
from raypkg.models import build_model


def with_margins(*margins):
    margins = torch.tensor(margins)
    y = torch.zeros(len(margins), dtype=torch.int64)
    return Record(y, torch.zeros(len(margins)), margins=margins)


def with_features(features, errors=None):
    """A view of these features, and of two classes whose errors ‖p − e_y‖ are √2 times the given ones."""
    wrong = torch.full((len(features),), 0.5) if errors is None else torch.tensor(errors)
    logits = torch.stack([(1 - wrong).log(), wrong.log()], dim=1)
    return HeadView(logits.double(), torch.tensor(features, dtype=torch.float64), torch.zeros(len(features)).long())


# Margins


def test_a_margin_is_the_label_s_logit_above_all_others_together():
    view = reference.problem(50).view
    own = view.logits.gather(1, view.y[:, None])[:, 0]
    others = view.logits.scatter(1, view.y[:, None], -torch.inf).logsumexp(dim=1)
    margins = margins_of(F.cross_entropy(view.logits, view.y, reduction="none"))
    torch.testing.assert_close(margins, (own - others).float())


@pytest.mark.parametrize("loss, margin", [(0.0, 15.94), (1e-9, 15.94), (100.0, -100.0), (math.log(2), 0.0)])
def test_margins_of_extreme_losses_are_finite(loss, margin):
    assert margins_of(torch.tensor([loss])).item() == pytest.approx(margin, abs=0.01)


class Margins(Hook):
    """Spells out the margin of each sample's step by another forward pass before the step."""

    def __init__(self, n):
        self.exact = torch.zeros(n)

    def on_gradients(self, run):
        with torch.no_grad():
            logits = run.model(run.batch.x).float()
        own = logits.gather(1, run.batch.y[:, None])[:, 0]
        others = logits.scatter(1, run.batch.y[:, None], -torch.inf)
        self.exact[run.batch.indices] += own - others.logsumexp(dim=1)


@pytest.fixture(scope="module")
def trained():
    """An MLP that learned the digits for four epochs, with a recorder and with what it should have recorded."""
    split = load_data("digits").train
    recorder, twin = Recorder(split.y), Margins(len(split))
    model = build_model("mlp", split.shape, split.num_classes, seed=0)
    training = Training(epochs=4, precision="float32")
    fit(Run.simple(model, split, training, hooks=[recorder, twin], augment=()))
    return recorder, twin


def test_the_area_under_the_margin_is_recorded_and_survives_a_checkpoint(trained):
    recorder, twin = trained
    torch.testing.assert_close(recorder.record.margins, twin.exact / 4, rtol=0, atol=0.05)
    again = Recorder(recorder.y)
    again.load_state_dict(recorder.state_dict())
    assert again.record.margins.equal(recorder.record.margins)


# CCS


@pytest.mark.parametrize(
    ("margins", "beta", "strata", "budget", "rare", "easiest"),
    [
        # strata of [0, 9.9] in thirds: 8, 0 and 10; the two hardest are dropped, the others drawn from alike
        ([-9.0, -8.0, *[0.0] * 3, *[1.0] * 5, *[9.9] * 10], 0.1, 3, 8, set(), (10, 4)),
        ([0.0, 0.1, *[5.0] * 30, *[10.0] * 30], 0.0, 4, 12, {0, 1}, (32, 5)),  # all of a rare stratum
    ],
)
def test_ccs_leaves_out_the_hardest_and_draws_as_many_from_each_stratum(margins, beta, strata, budget, rare, easiest):
    options = {"beta": beta, "strata": strata}
    picked = coreset["ccs"](with_margins(*margins), budget, rng=generator(0), options=options).indices
    first, count = easiest
    assert {0, 1} & set(picked.tolist()) == rare and len(picked) == budget
    assert int((picked >= first).sum()) == count


def test_ccs_drops_no_more_than_the_budget_allows():
    record = with_margins(*torch.arange(10.0).tolist())
    picked = coreset["ccs"](record, 8, rng=generator(0), options={"beta": 0.9}).indices
    assert sorted(picked.tolist()) == [2, 3, 4, 5, 6, 7, 8, 9]


def test_ccs_draws_evenly_among_equal_margins():
    times = torch.zeros(12)
    for seed in range(600):
        times[coreset["ccs"](with_margins(*[1.0] * 12), 3, rng=generator(0, seed)).indices] += 1
    assert ((times / 600 - 0.25).abs() < 5 * (0.25 * 0.75 / 600) ** 0.5).all()


def test_ccs_takes_the_margins_of_a_view_where_there_is_no_record():
    view = reference.problem(60).view
    losses = F.cross_entropy(view.logits, view.y, reduction="none")
    record = Record(view.y, losses.float(), margins=margins_of(losses))
    of_view, of_record = (select(samples, 12, "ccs", seed=0).indices for samples in (view, record))
    assert of_view.equal(of_record)


@pytest.mark.parametrize("record", [Record.empty(torch.zeros(4).long()), with_margins(*[torch.inf] * 4)])
def test_ccs_needs_margins(record):
    with pytest.raises(UserError, match="ccs needs the margins that a training recorded of these samples"):
        coreset["ccs"](record, 2, rng=generator(0))


def test_a_sample_that_was_not_trained_on_counts_as_easy():
    record = with_margins(-1.0, torch.inf, 2.0, 2.0)
    picked = coreset["ccs"](record, 3, rng=generator(0), options={"beta": 0.25}).indices
    assert sorted(picked.tolist()) == [1, 2, 3]


# D2 pruning


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"relative": False, "forward": 0.3}, {"neighbours": 3, "reverse": 0.2}])
def test_d2_equals_its_slow_twin_in_blocks_of_any_size(seed, options, monkeypatch):
    monkeypatch.setattr("raypkg.coresets.rules.coverage.BLOCK", 7 + 100 * (seed % 2))
    view = reference.problem(40, seed=seed).view
    given = {"neighbours": 10, "forward": 1.0, "reverse": 1.0, "relative": True} | options
    assert coreset["d2"](view, 15, options=options).indices.tolist() == reference.message_passing(view, 15, **given)


def test_d2_by_hand():
    """The middle of three neighbours hears of two hard ones; once it is taken, the lone sample is worth more."""
    view = with_features([[0.0], [0.5], [1.0], [50.0]], errors=[0.6, 0.5, 0.4, 0.3])
    options = {"neighbours": 2, "relative": False}
    assert coreset["d2"](view, 3, options=options).indices.tolist() == [1, 3, 0]
    assert coreset["d2"](view, 3, options={**options, "reverse": 1e9}).indices.tolist() == [1, 0, 2]
    assert coreset["d2"](view, 3, options={**options, "forward": 1e9}).indices.tolist() == [0, 3, 2]


# Gm matching


def test_the_geometric_median_by_hand():
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(corners, 100), torch.full((2,), 0.5, dtype=torch.float64))
    line = torch.tensor([[0.0], [1.0], [100.0]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(line, 500), line[1], atol=1e-3, rtol=0)


def test_each_choice_of_gm_is_the_one_that_brings_the_mean_nearest_to_the_median():
    view = reference.problem(60).view
    features = F.normalize(view.features, dim=1)
    median = geometric_median(features, 100)
    chosen = []
    for _ in range(12):
        left = [i for i in range(60) if i not in chosen]
        chosen.append(min(left, key=lambda i: float((features[[*chosen, i]].mean(dim=0) - median).norm())))
    assert coreset["gm"](view, 12).indices.tolist() == chosen


# CRAIG, k-center, moderate, uncertainty and GradMatch's look-ahead


def craig(view, budget, **options):
    return coreset["craig"](view, budget, rng=generator(0), memory=2**30, options=options)


def in_feature_space(features, y=None):
    features = torch.tensor(features)
    y = torch.zeros(len(features), dtype=torch.int64) if y is None else torch.tensor(y)
    return HeadView(torch.zeros(len(y), int(y.max()) + 1), features, y)


@pytest.mark.parametrize("greedy", ["lazy", "stochastic"])
@pytest.mark.parametrize("seed", range(3))
def test_craig_keeps_the_mean_gradient_within_its_bound(seed, greedy):
    view = reference.problem(200, seed=seed).view
    picked = craig(view, 50, greedy=greedy)
    error = (view[picked.indices].mean(picked.weights) - view.mean()).norm()
    assert error <= reference.left_over(view.distances(), picked.indices.tolist()) / 200
    assert error < (view[picked.indices].mean() - view.mean()).norm()


def test_craig_by_class_weighs_within_the_class():
    view = reference.problem(80).view
    picked = select(view, 20, "craig", seed=0)
    shares = class_budgets(view.y.bincount(), 20).double()
    weights = torch.zeros(4, dtype=torch.float64).index_add_(0, view.y[picked.indices], picked.weights.double())
    torch.testing.assert_close(weights, shares, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_kcenter_equals_its_slow_twin(seed):
    view = reference.problem(40, seed=seed).view
    assert coreset["kcenter"](view, 12).indices.tolist() == reference.farthest_first(view.features, 12)


@pytest.mark.parametrize("ahead", [1, 3])
def test_gradmatch_picks_the_same_however_far_it_looks_ahead(monkeypatch, ahead):
    view = reference.problem(120, width=64).view
    picked = coreset["gradmatch"](view, 40, options={"lam": 0.01})
    monkeypatch.setattr("raypkg.coresets.solvers.AHEAD", ahead)  # rows are dropped for others many times
    again = coreset["gradmatch"](view, 40, options={"lam": 0.01})
    assert again.indices.equal(picked.indices)
    torch.testing.assert_close(again.weights, picked.weights)


def test_kcenter_takes_repeated_samples_last_and_by_position():
    view = in_feature_space([[0.3, 7.0], [0.3, 7.0], [0.1, 0.2], [0.3, 7.0], [0.1, 0.2]])
    assert coreset["kcenter"](view, 5).indices.tolist() == [0, 2, 1, 3, 4]


def test_moderate_by_hand_and_within_each_class():
    first, second = [[-6.0], [-2.0], [-1.0], [2.0], [7.0]], [[90.0], [100.0], [110.5], [99.5]]
    assert coreset["moderate"](in_feature_space(first), 4).indices.tolist() == [1, 3, 2, 0]  # 6 2 1 2 7 from 0
    even = in_feature_space([[-6.0], [-2.0], [1.0], [7.0]])  # of 6 2 1 7 the lower middle is 2
    assert coreset["moderate"](even, 4).indices.tolist() == [1, 2, 0, 3]
    view = in_feature_space(first + second, [1] * 5 + [3] * 4)  # centres 0 and 100; distances of class 3: 10 0 10.5 .5
    assert coreset["moderate"](view, 5).indices.tolist() == [1, 3, 8, 6, 2]
    assert select(view, 4, "moderate", seed=0).indices.tolist() == [1, 3, 8, 6]


@pytest.mark.parametrize("measure", ["margin", "entropy", "confidence"])
@pytest.mark.parametrize("seed", range(3))
def test_uncertainty_equals_its_formula(measure, seed):
    view = reference.problem(50, seed=seed).view
    p = view.logits.softmax(dim=1)
    top = p.topk(2).values
    scores = {"margin": top[:, 1] - top[:, 0], "entropy": -(p * p.log()).sum(dim=1), "confidence": -top[:, 0]}[measure]
    picked = coreset["uncertainty"](view, 12, options={"measure": measure})
    assert picked.indices.equal(scores.topk(12).indices) and picked.weights.eq(1).all()


@pytest.mark.parametrize("measure", ["margin", "entropy", "confidence"])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_uncertainty_orders_confident_predictions(measure, num_classes):
    lead = torch.tensor([60.0, 20.0, 80.0, 40.0, 0.5])  # in float32, p_1 = 1 from a lead of 17
    view = HeadView(F.pad(lead[:, None], (0, num_classes - 1)), torch.ones(5, 1), torch.zeros(5).long())
    picked = coreset["uncertainty"](view, 5, options={"measure": measure})
    assert picked.indices.tolist() == [4, 1, 3, 0, 2]

import math
from itertools import combinations

import pytest
import torch

import reference
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.budgets import class_budgets, select
from raypkg.coresets.facility import Distances, cluster_shares, facility_location
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.rules import coreset


def craig(view, budget, **options):
    return coreset["craig"](view, budget, rng=generator(0), memory=2**30, options=options)


def in_feature_space(features, y=None):
    features = torch.tensor(features)
    y = torch.zeros(len(features), dtype=torch.int64) if y is None else torch.tensor(y)
    return HeadView(torch.zeros(len(y), int(y.max()) + 1), features, y)


def with_probabilities(*p):
    logits = torch.tensor(p).log()
    return HeadView(logits, torch.ones(len(p), 1), torch.zeros(len(p), dtype=torch.int64))


def test_craig_weighs_medoids_by_their_clusters():
    view = reference.problem(60).view
    picked = craig(view, 15)
    assert picked.indices.equal(facility_location(Distances(view, memory=0), 15))
    torch.testing.assert_close(
        picked.weights, (cluster_shares(Distances(view, memory=0), picked.indices) * 15 / 60).float()
    )
    assert picked.weights.mean() == pytest.approx(1)


@pytest.mark.parametrize("greedy", ["lazy", "stochastic"])
@pytest.mark.parametrize("seed", range(3))
def test_craig_keeps_the_mean_gradient_within_its_bound(seed, greedy):
    view = reference.problem(200, seed=seed).view
    picked = craig(view, 50, greedy=greedy)
    error = (view[picked.indices].mean(picked.weights) - view.mean()).norm()
    assert error <= reference.left_over(view.distances(), picked.indices.tolist()) / 200
    assert error < (view[picked.indices].mean() - view.mean()).norm()


def test_craig_of_everything_is_everything():
    assert craig(reference.problem(30).view, 30).weights.tolist() == [1] * 30


def test_craig_draws_fewer_candidates_for_a_larger_epsilon(monkeypatch):
    asked, view = [], reference.problem(100).view
    draw = torch.randperm
    monkeypatch.setattr(
        "raypkg.coresets.rules.coverage.stochastic_facility_location", lambda *a, **k: asked.append(k) or draw(10)
    )
    for epsilon in (0.01, 0.5):
        craig(view, 10, greedy="stochastic", epsilon=epsilon)
    assert [k["sample"] for k in asked] == [math.ceil(10 * math.log(100)), math.ceil(10 * math.log(2))]


@pytest.mark.parametrize("epsilon", [0.0, 1.0, -0.1])
def test_craig_epsilon_out_of_range(epsilon):
    with pytest.raises(UserError, match=f"craig option epsilon = {epsilon}"):
        craig(reference.problem(10).view, 2, epsilon=epsilon)


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


def test_kcenter_by_hand():
    view = in_feature_space([[0.0], [1.0], [4.0], [5.0], [11.0]])  # mean 4.2
    assert coreset["kcenter"](view, 4).indices.tolist() == [2, 4, 0, 1]  # 1 and 3 are as far: by position


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 2, 4])
def test_kcenter_covers_within_twice_the_optimum(seed, k):
    view = reference.problem(9, seed=seed).view
    distances = reference.pairwise(view.features)
    least = min(distances[list(centres)].amin(dim=0).max() for centres in combinations(range(9), k))
    assert distances[coreset["kcenter"](view, k).indices].amin(dim=0).max() <= 2 * least


def test_kcenter_takes_repeated_samples_last_and_by_position():
    view = in_feature_space([[0.3, 7.0], [0.3, 7.0], [0.1, 0.2], [0.3, 7.0], [0.1, 0.2]])
    assert coreset["kcenter"](view, 5).indices.tolist() == [0, 2, 1, 3, 4]


def test_moderate_by_hand():
    view = in_feature_space([[-6.0], [-2.0], [-1.0], [2.0], [7.0]])  # distances 6 2 1 2 7 from 0, median 2
    assert coreset["moderate"](view, 4).indices.tolist() == [1, 3, 2, 0]
    view = in_feature_space([[-6.0], [-2.0], [1.0], [7.0]])  # of 6 2 1 7 the lower middle is 2
    assert coreset["moderate"](view, 4).indices.tolist() == [1, 2, 0, 3]


def test_moderate_compares_samples_with_their_own_class():
    first, second = [[-6.0], [-2.0], [-1.0], [2.0], [7.0]], [[90.0], [100.0], [110.5], [99.5]]
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


def test_the_measures_of_uncertainty_by_hand():
    view = with_probabilities([0.5, 0.45, 0.05], [0.4, 0.3, 0.3], [0.44, 0.28, 0.28], [0.9, 0.05, 0.05])
    expected = {"margin": [0, 1, 2, 3], "entropy": [1, 2, 0, 3], "confidence": [1, 2, 0, 3]}
    for measure, order in expected.items():
        assert coreset["uncertainty"](view, 4, options={"measure": measure}).indices.tolist() == order
    assert coreset["uncertainty"](view, 1).indices.tolist() == [0]


@pytest.mark.parametrize("measure", ["margin", "entropy", "confidence"])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_uncertainty_orders_confident_predictions(measure, num_classes):
    lead = torch.tensor([60.0, 20.0, 80.0, 40.0, 0.5])  # in float32, p_1 = 1 from a lead of 17
    view = HeadView(
        torch.nn.functional.pad(lead[:, None], (0, num_classes - 1)),
        torch.ones(5, 1),
        torch.zeros(5, dtype=torch.int64),
    )
    picked = coreset["uncertainty"](view, 5, options={"measure": measure})
    assert picked.indices.tolist() == [4, 1, 3, 0, 2]


def test_uncertainty_does_not_look_at_labels():
    view = reference.problem(50).view
    other = HeadView(view.logits, view.features, (view.y + 1) % 4)
    assert coreset["uncertainty"](view, 12).indices.equal(coreset["uncertainty"](other, 12).indices)


def test_uncertainty_measure_is_checked():
    with pytest.raises(UserError, match="unknown uncertainty option measure 'entropie', did you mean 'entropy'"):
        coreset["uncertainty"](reference.problem(10).view, 2, options={"measure": "entropie"})

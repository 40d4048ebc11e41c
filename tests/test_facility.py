import json
import resource
import sys
from pathlib import Path

import pytest
import torch

import reference
from measured import in_fresh_process
from raypkg.core.seeds import generator
from raypkg.coresets import facility
from raypkg.coresets.facility import Distances, cluster_shares, facility_location, stochastic_facility_location
from raypkg.coresets.gradients import HeadView

PLENTY = 2**30
MEBIBYTE = 2**20
CROWD = 5000  # samples, 95 MiB of distances


def gradient_distances(problem):
    """Between gradients that are materialised one sample at a time, in float64."""
    return reference.pairwise(reference.per_sample_gradients(problem).flatten(1).double())


def line(*points):
    """A view whose gradients are (±x, ±½) from features x on a line, all of one class and p = (½, ½)."""
    x = torch.tensor(points, dtype=torch.float64)[:, None]
    return HeadView(torch.zeros(len(x), 2, dtype=torch.float64), x, torch.zeros(len(x), dtype=torch.int64))


def crowded(n, *, seed=0):
    """What a trained network sees: a few tight clusters a class, most samples fitted almost exactly."""
    rng = generator(seed, "crowded")
    centres = torch.randn(12, 16, generator=rng).relu()
    cluster = torch.randint(12, (n,), generator=rng)
    features = centres[cluster] + 1e-3 * torch.randn(n, 16, generator=rng)
    logits = torch.randn(n, 3, generator=rng)
    y = cluster % 3
    logits[torch.arange(n), y] += 12 * torch.rand(n, generator=rng)
    return HeadView(logits, features, y)


def repeated(view, times=3):
    return view[torch.arange(len(view)).repeat(times)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_lazy_greedy_picks_as_plain_greedy_on_materialised_gradients(seed, dtype):
    problem = reference.problem(50, seed=seed, dtype=dtype)
    picked = facility_location(Distances(problem.view, memory=PLENTY), 20)
    double = reference.Problem(problem.head.double(), problem.features.double(), problem.y)
    slack = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    assert picked.tolist() == reference.greedy_medoids(gradient_distances(double), 20, slack=slack)


@pytest.mark.parametrize("seed", range(3))
def test_lazy_greedy_picks_as_plain_greedy_among_crowds_and_in_single_precision_as_good_ones(seed):
    view = crowded(400, seed=seed)
    exact = view.double().distances()
    best = reference.greedy_medoids(exact, 60)
    assert facility_location(Distances(view.double(), memory=PLENTY), 60).tolist() == best
    picked = facility_location(Distances(view, memory=PLENTY), 60)
    assert reference.left_over(exact, picked.tolist()) <= 1.01 * reference.left_over(exact, best)


@pytest.mark.parametrize(
    "view", [crowded(300), repeated(crowded(100)), crowded(300).double()], ids=["crowds", "repeats", "double"]
)
def test_memory_does_not_change_the_medoids(view):
    row = len(view) * view.logits.element_size()
    bounds = (0, row - 1, 7 * row, len(view) * row // 2, len(view) * row - 1, len(view) * row)
    found = []
    for memory in bounds:
        distances = Distances(view, memory=memory)
        lazy = facility_location(distances, 90)
        drawn = stochastic_facility_location(distances, 90, sample=9, rng=generator(0))
        found.append((lazy, drawn, cluster_shares(distances, lazy)))
    assert all(a.equal(b) for each in found for a, b in zip(each, found[0], strict=True))


def test_memory_is_bounded(monkeypatch):
    view, asked = crowded(600), []
    distances = HeadView.distances
    monkeypatch.setattr(HeadView, "distances", lambda a, b, out=None: asked.append((len(a), len(b))) or distances(a, b))
    facility_location(Distances(view, memory=0), 5)
    assert set(asked) == {(facility.PRODUCT, 600)}


def test_selection_stays_within_its_memory():
    row = 4 * CROWD / MEBIBYTE
    found = in_fresh_process(Path(__file__), PLENTY)
    assert found["grown"] < (CROWD + 10 * facility.PRODUCT) * row


def test_gains_are_evaluated_lazily(monkeypatch):
    view, asked = crowded(1000), []
    rows = Distances.__call__
    monkeypatch.setattr(Distances, "__call__", lambda self, samples: asked.append(len(samples)) or rows(self, samples))
    facility_location(Distances(view, memory=PLENTY), 100)
    assert sum(asked) < 5 * len(view)  # plain greedy: 95 times


@pytest.mark.parametrize("memory", [0, PLENTY])
def test_more_samples_tie_than_are_in_front(memory):
    view = line(*[0.0] * 200, *[9.0] * 200, 1.0, 5.0)
    assert facility_location(Distances(view, memory=memory), 4).tolist() == [401, 0, 200, 400]  # at 5, 0, 9 and 1


def test_medoids_and_clusters_on_a_line_by_hand():
    view = line(0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 40.0)
    distances = Distances(view, memory=PLENTY)
    assert facility_location(distances, 3).tolist() == [3, 6, 4]  # 10 and 11 gain 14 each, 10 is more central
    assert cluster_shares(distances, torch.tensor([3, 6, 4])).tolist() == [4, 1, 2]
    distances = Distances(line(0.0, 1.0, 2.0, 3.0), memory=PLENTY)
    assert cluster_shares(distances, torch.tensor([0, 2])).tolist() == [1.5, 2.5]
    assert cluster_shares(distances, torch.tensor([3, 1])).tolist() == [1.5, 2.5]


def test_two_samples_apart_gain_the_same_and_the_central_one_is_chosen():
    view = line(0.0, 0.1, 0.2, 9.0, 8.0)
    assert facility_location(Distances(view, memory=PLENTY), 2).tolist() == [2, 4]
    order = torch.tensor([4, 3, 2, 1, 0])
    assert order[facility_location(Distances(view[order], memory=PLENTY), 2)].tolist() == [2, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_repeated_samples_are_chosen_last_and_share_their_clusters(dtype):
    once = reference.problem(20, dtype=dtype).view
    view = repeated(once)
    distances = Distances(view, memory=PLENTY)
    picked = facility_location(distances, 60)
    assert sorted(picked[:20].tolist()) == list(range(20))  # of equal gains the first sample
    assert cluster_shares(distances, picked).tolist() == pytest.approx([1] * 60)
    drawn = stochastic_facility_location(distances, 60, sample=3, rng=generator(0))
    assert sorted(drawn.tolist()) == list(range(60))
    assert cluster_shares(distances, picked[:20]).tolist() == [3] * 20


def test_a_view_without_features_is_judged_by_its_logit_gradients():
    view = HeadView(reference.problem(60).view.logits, torch.empty(60, 0, dtype=torch.float64), reference.problem(60).y)
    expected = reference.greedy_medoids(reference.pairwise(view.residual), 20)
    assert facility_location(Distances(view, memory=PLENTY), 20).tolist() == expected


def test_stochastic_greedy_that_draws_everyone_is_plain_greedy():
    view = reference.problem(150).view  # more than one product
    drawn = stochastic_facility_location(Distances(view, memory=0), 9, sample=150, rng=generator(0))
    assert drawn.tolist() == reference.greedy_medoids(view.distances(), 9)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB


if __name__ == "__main__":
    facility_location(Distances(crowded(300), memory=0), 30)  # what the libraries need once
    view, before = crowded(CROWD), peak()
    distances = Distances(view, memory=int(sys.argv[1]))
    cluster_shares(distances, facility_location(distances, 50))
    print(json.dumps({"grown": peak() - before}))

"""The methods against their slow twins on views of real samples by a trained model, in both precisions."""

import pytest
import torch

import reference
from raypkg.core.settings import Training
from raypkg.coresets.budgets import select_class
from raypkg.coresets.gradients import HeadView, head_view
from raypkg.coresets.rules import coreset
from raypkg.data import load_data
from raypkg.engine.batches import plain_batches
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.models import build_model

LABEL, BUDGET, LAM = 3, 24, 0.5


@pytest.fixture(scope="module")
def problem():
    """What an MLP trained on the digits for two epochs makes of one class, in float64."""
    split = load_data("digits").train
    model = build_model("mlp", split.shape, split.num_classes, seed=0)
    training = Training(epochs=2, precision="float32")
    fit(Run.simple(model, split, training, augment=()))
    members = (split.y == LABEL).nonzero()[:, 0]
    view = head_view(model, plain_batches(split, members, torch.device("cpu")))
    head = torch.cat([model.head.weight, model.head.bias[:, None]], dim=1).detach().double()
    return reference.Problem(head, view.features.double(), view.y)


@pytest.fixture(scope="module")
def gradients(problem):
    return reference.per_sample_gradients(problem).flatten(1)  # [n, C·(D+1)]


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def view(problem, request):
    exact = problem.view
    return HeadView(exact.logits.to(request.param), exact.features.to(request.param), exact.y)


def pick(name, view, **options):
    return select_class(view, BUDGET, coreset[name], seed=0, label=LABEL, options=options)


def mismatch(gradients, weights):
    """‖Σ v g − ḡ‖² + λ‖v‖² of weights w = k·v by sample."""
    v = torch.tensor(list(weights.values()), dtype=torch.float64)
    return float((v @ gradients[list(weights)] - gradients.mean(dim=0)).square().sum() + LAM * v @ v)


def test_gradmatch(view, gradients):
    picked = pick("gradmatch", view, relative=False, normalise=False)
    ours = dict(zip(picked.indices.tolist(), (picked.weights.double() / BUDGET).tolist(), strict=True))
    slow = reference.matching_pursuit(gradients, gradients.mean(dim=0), BUDGET, LAM)
    assert mismatch(gradients, ours) == pytest.approx(mismatch(gradients, slow), rel=1e-4)


def test_craig(view, gradients):
    distances = reference.pairwise(gradients)
    slow = reference.greedy_medoids(distances, BUDGET)
    ours = pick("craig", view).indices.tolist()
    assert reference.left_over(distances, ours) == pytest.approx(reference.left_over(distances, slow), rel=1e-4)


@pytest.mark.parametrize("rounds", [1, 6])
def test_glister(view, problem, rounds):
    slow = reference.glister(problem, problem, BUDGET, eta=0.002, rounds=rounds)
    assert pick("glister", view, eta=0.002, rounds=rounds).indices.tolist() == slow


def test_grand(view, gradients):
    assert pick("grand", view).indices.tolist() == gradients.norm(dim=1).topk(BUDGET).indices.tolist()


def test_kcenter(view, problem):
    assert pick("kcenter", view).indices.tolist() == reference.farthest_first(problem.features, BUDGET)

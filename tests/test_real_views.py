"""Rules against the textbook's forms on views of real samples by a trained model."""

import pytest
import torch

import reference
from raypkg.core.seeds import generator
from raypkg.core.settings import Training
from raypkg.coresets.budgets import select, select_class
from raypkg.coresets.gradients import head_view
from raypkg.coresets.rules import coreset
from raypkg.data import load_data
from raypkg.engine.batches import plain_batches
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.models import build_model


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

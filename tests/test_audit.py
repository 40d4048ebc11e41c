"""Influence functions against dense Hessians by autograd, and against retraining without a sample."""

import pytest
import torch
from torch.nn import functional as F

import reference
from raypkg.core.errors import UserError
from raypkg.methods.audit import influence as functions
from raypkg.methods.audit.influence import HeadHessian

N, DECAY = 200, 0.2
LEFT_OUT = 12  # samples, one after another
TRAIN = reference.problem(N)
HELD_OUT = reference.problem(25, seed=1)


@pytest.fixture(scope="module")
def trained():
    """The problem at the minimum of its regularised loss, and the held-out one at the same head."""
    head = reference.minimum(reference.regularised(TRAIN, DECAY), TRAIN.head).view_as(TRAIN.head)
    return [reference.Problem(head, each.features, each.y) for each in (TRAIN, HELD_OUT)]


def held_out_loss(head):
    return F.cross_entropy(reference.logits(head, HELD_OUT.features), HELD_OUT.y)


def dense(p):
    return torch.autograd.functional.hessian(reference.regularised(p, DECAY), p.head.flatten())


@pytest.mark.parametrize("classes", [2, 5])
def test_product_and_factor_are_those_of_the_dense_hessian(classes):
    p = reference.problem(N, classes)  # not at a minimum
    expected = dense(p)
    hessian = HeadHessian(p.view, DECAY)
    torch.testing.assert_close(hessian.factor @ hessian.factor.T, expected, rtol=0, atol=1e-12)
    v = torch.randn(p.head.shape, dtype=torch.float64)
    torch.testing.assert_close(hessian.product(v).flatten(), expected @ v.flatten(), rtol=1e-12, atol=1e-12)


def test_influences_are_those_of_materialised_gradients(trained, monkeypatch):
    p, held_out = trained
    gradients = reference.per_sample_gradients(p).flatten(1)
    inverse = torch.linalg.inv(dense(p))
    slope = torch.autograd.functional.jacobian(held_out_loss, p.head).flatten()
    hessian = HeadHessian(p.view, DECAY)
    expected = -(gradients - gradients.mean(0)) @ inverse @ slope
    torch.testing.assert_close(functions.influence(p.view, held_out.view, hessian), expected, rtol=1e-9, atol=1e-11)
    expected = torch.einsum("ip,pq,iq->i", gradients, inverse, gradients)
    for at_once in (functions.AT_ONCE, 7 * hessian.size):  # in blocks, too
        monkeypatch.setattr(functions, "AT_ONCE", at_once)
        torch.testing.assert_close(functions.self_influence(p.view, hessian), expected, rtol=1e-9, atol=1e-11)


def test_predictions_are_near_retraining_without_samples(trained):
    """Every prediction is within 10 % of the largest change, and they are correlated at 0.99."""
    p, held_out = trained
    values = functions.influence(p.view, held_out.view, HeadHessian(p.view, DECAY))
    predicted, actual = [], []
    for removed in [[i] for i in range(LEFT_OUT)] + [values.argsort()[-2:].tolist()]:
        predicted.append(-values[removed].sum() / (N - len(removed)))
        head = reference.minimum(reference.regularised(p, DECAY, removed), p.head).view_as(p.head)
        actual.append((held_out_loss(head) - held_out_loss(p.head)).item())
    both = torch.tensor([predicted, actual])
    for each in (both[:, :-1], both):  # single samples, and a pair with them
        assert (each[0] - each[1]).abs().max() < 0.1 * each[1].abs().max()
    assert torch.corrcoef(both[:, :-1])[0, 1] > 0.99


def test_conjugate_gradients_end_at_the_exact_solution(trained, monkeypatch):
    p, held_out = trained
    hessian, slope = HeadHessian(p.view, DECAY), held_out.view.mean()
    exact = hessian.solve(slope)
    monkeypatch.setattr(functions, "EXACT", 1)
    torch.testing.assert_close(hessian.solve(slope), exact, rtol=1e-8, atol=1e-10)
    with pytest.raises(UserError, match="by = self: the head has 28 parameters"):
        functions.self_influence(p.view, hessian)
    monkeypatch.setattr(functions, "STEPS", 2)
    with pytest.raises(UserError, match="have not converged after 2 steps: give a larger --damping"):
        hessian.solve(slope)

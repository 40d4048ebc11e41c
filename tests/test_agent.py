"""AGENT's correction against closed forms, and the loop written out."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from raypkg.core.errors import UserError
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import Batches
from raypkg.engine.loop import fit
from raypkg.engine.run import Hook
from raypkg.engine.worker import Worker
from raypkg.methods.agent.control_variate import coefficient, cosine_similarity, smoothed
from raypkg.methods.agent.hook import Correction
from raypkg.methods.agent.settings import AgentOptions
from sparse_training import PLAIN, STEPS, C, D, N, network, rng, run, sparse, split


def test_c_is_the_ratio_of_covariance_and_variance():
    a, b = torch.randn(2, 30, generator=rng())
    assert coefficient(a, b) == pytest.approx(np.cov(a, b)[0, 1] / np.var(b.numpy(), ddof=1), rel=1e-6)
    assert coefficient(a, torch.ones(30)) == 0.0
    assert smoothed(1.0, 3.0, 0.25) == 1.5


def test_drift_does_not_pass_for_covariance():
    """Losses that fall along the way: differences find the batches' covariance, the plain ratio does not."""
    snapshot, noise = torch.randn(2, 500, generator=rng())
    current = 0.7 * snapshot + 0.1 * noise + torch.linspace(0, 50, 500)
    assert coefficient(current.diff(), snapshot.diff()) == pytest.approx(0.7, abs=0.05)
    assert abs(coefficient(current, snapshot) - 0.7) > 0.2


def test_cosine():
    a = [torch.tensor([3.0, 0.0]), torch.tensor([0.0])]
    b = [torch.tensor([0.0, 4.0]), torch.tensor([0.0])]
    zero = [torch.zeros(2), torch.zeros(1)]
    assert [cosine_similarity(a, other) for other in (a, b, zero)] == [1.0, 0.0, 0.0]


def test_c_comes_from_the_losses_of_model_and_snapshot():
    losses = []

    class Losses(Hook):
        def on_gradients(self, run):
            x, y = run.batch.x, run.batch.y
            losses.append([F.cross_entropy(model(x), y).item() for model in (run.model, hook.snapshot)])

    hook = Correction(AgentOptions(gamma=0.5))
    fit(run(Losses(), hook, settings=PLAIN.model_copy(update={"epochs": 2})))
    model, snapshot = np.array(losses[:6]).T  # of the first epoch, [6] each
    expected = 0.3 * np.cov(np.diff(model), np.diff(snapshot))[0, 1] / np.var(np.diff(snapshot), ddof=1)
    assert hook.c == pytest.approx(expected, rel=1e-4)


def test_without_a_weight_nothing_changes_bit_for_bit():
    model = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, C))
    plain = fit(run(*sparse(), model=copy.deepcopy(model)))
    idle = Correction(AgentOptions(alpha=0.0))
    with_it = fit(run(*sparse(correction=[idle]), model=copy.deepcopy(model)))
    for name, value in plain.model.state_dict().items():
        assert value.equal(with_it.model.state_dict()[name]), name
    assert idle.results(with_it).findings == ["AGENT corrected no step: its weight c stayed 0"]


@pytest.mark.parametrize("damped", [0.3, 1.0])
def test_it_equals_the_loop_written_out(damped):
    settings = PLAIN.model_copy(update={"precision": "float64", "momentum": 0.0, "nesterov": False})
    hook, model = Correction(AgentOptions(gamma=damped, alpha=0.0)), network().double()
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
    gradients = {}

    class Variance(Hook):
        def __init__(self, name):
            self.name = name

        def on_gradients(self, run):
            gradient = torch.cat([p.grad.flatten() for p in run.model.parameters()])
            gradients.setdefault(self.name, []).append(gradient.clone())

    hook = Correction(AgentOptions(gamma=1.0, alpha=0.0))
    hook.c = 1.0
    slow = PLAIN.model_copy(update={"epochs": 1, "lr": 1e-4})
    fit(run(Variance("raw"), hook, Variance("corrected"), settings=slow))
    raw, corrected = (torch.stack(gradients[name]).var(0).sum() for name in ("raw", "corrected"))
    assert corrected < 1e-3 * raw


def test_gradients_are_counted_where_they_are_computed():
    hook = Correction(AgentOptions(gamma=0.5, samples=32, every_steps=2))
    trained = fit(run(hook))
    steps = trained.bill("correction")
    assert (steps.forward, steps.backward) == (N // 2 * 5, N // 2 * 4)  # none in the first epoch, while c = 0
    assert trained.bill("full gradient").backward == 32 * 4
    assert [row[0] for row in hook.history] == list(range(0, STEPS, 2))


@pytest.mark.parametrize("every", [1, 2])
def test_kept_gradients_are_those_that_would_be_computed_again(every):
    kept = Correction(AgentOptions(gamma=0.5, every_steps=every))
    again = Correction(AgentOptions(gamma=0.5, every_steps=every, memory=0))
    one = fit(run(*sparse(correction=[kept])))
    other = fit(run(*sparse(correction=[again])))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    np.testing.assert_array_equal(kept.history, again.history)
    assert list(kept.kept) == list(range(STEPS - STEPS // 5, STEPS, every)) and not again.kept
    assert one.bill("correction").backward == 0 and one.bill("full gradient").backward == 4 * N
    assert other.bill("correction").backward == 4 * N // every


def test_batches_that_another_hook_supplies_keep_no_gradients():
    class Supplier(Hook):
        supplies_batches = True

        def batches(self, run):
            return None

    hook = Correction(AgentOptions(gamma=0.5))
    fit(run(hook, Supplier()))
    assert hook.full and not hook.kept


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
    with pytest.raises(UserError, match="agent: the model gives one batch two outputs"):
        fit(run(Correction(AgentOptions()), model=model))

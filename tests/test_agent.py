"""AGENT's correction against closed forms, and the loop written out."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from gloo import on_workers
from raypkg.core.errors import UserError
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import Batches
from raypkg.engine.loop import fit
from raypkg.engine.run import Hook
from raypkg.engine.worker import Worker
from raypkg.methods.agent.control_variate import coefficient, cosine_similarity, smoothed
from raypkg.methods.agent.hook import Correction
from raypkg.methods.agent.settings import AgentOptions
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage
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


def test_the_cosine_does_not_depend_on_where_gradients_lie_in_memory():
    draws = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1001, generator=draws)
    found = set()
    for offset in range(16):  # DDP moves gradients between its buckets
        moved = torch.empty(1040)[offset : offset + 1001].copy_(a)
        found.add(cosine_similarity([moved], [b]))
    assert len(found) == 1


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


def dropping():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, C))


def attentive():
    torch.manual_seed(0)
    return Attentive()


DRAWING = pytest.mark.parametrize("build", [dropping, attentive])


def corrected(**options):
    """A correction at full weight from the first step on."""
    hook = Correction(AgentOptions(**{"gamma": 1.0, "alpha": 0.0, **options}))
    hook.c = 1.0
    return hook


class Gradients(Hook):
    """Keeps the gradient of every step, after the hooks before it."""

    def __init__(self, order):
        self.order = order
        self.seen = []

    def on_gradients(self, run):
        self.seen.append(torch.cat([parameter.grad.flatten() for parameter in run.model.parameters()]))


@DRAWING
def test_with_dropout_too_nothing_changes_without_a_weight(build):
    plain = fit(run(model=build()))
    with_it = fit(run(Correction(AgentOptions(alpha=0.0)), model=build()))
    for name, value in plain.model.state_dict().items():
        assert value.equal(with_it.model.state_dict()[name]), name


@DRAWING
def test_at_the_snapshot_dropout_leaves_exactly_the_full_gradient(build):
    """θ = θ̃ and the same masks: the two gradients are one, and γc = 1 leaves g̃."""
    raw, after, hook = Gradients(0), Gradients(50), corrected()
    fit(run(raw, hook, after, model=build(), precision="float64", epochs=1))
    full = torch.cat([gradient.flatten() for gradient in hook.full])
    assert not raw.seen[0].allclose(full)
    torch.testing.assert_close(after.seen[0], full, rtol=0, atol=1e-14)
    assert hook.history[0][2] == pytest.approx(1.0, abs=1e-14)  # the cosine


@DRAWING
def test_every_step_the_snapshot_draws_what_the_model_drew(build):
    """Weights that hardly move: all corrected gradients stay close to g̃, which those of other draws would not."""
    raw, after, hook = Gradients(0), Gradients(50), corrected()
    fit(run(raw, hook, after, model=build(), lr=1e-5, epochs=2))
    spread = torch.stack(raw.seen).var(dim=0).sum()
    within_epoch = torch.stack(after.seen[6:]).var(dim=0).sum()
    assert within_epoch < 1e-4 * spread


def test_the_full_gradient_has_dropout_of_its_own():
    one, other = corrected(), corrected()
    fit(run(one, model=dropping(), lr=1e-9, epochs=1, batch_size=96))
    fit(run(other, model=dropping(), lr=1e-9, epochs=2, batch_size=96))  # of its second epoch
    assert one.full and other.full
    assert not any(a.allclose(b, rtol=1e-3) for a, b in zip(one.full, other.full, strict=True))


@DRAWING
def test_dropout_stopped_and_resumed_equals_never_stopped(build, tmp_path):
    def start(last):
        trained = run(Correction(AgentOptions(gamma=0.5, alpha=0.5)), model=build())
        trained.last = last
        return trained

    straight = fit(start(None))
    kept = StoredCheckpoints(Storage(str(tmp_path)) / "kept")
    fit(start(2), checkpoints=kept)
    resumed = fit(start(None), checkpoints=kept)
    assert resumed.epoch == 5 and straight.hooks[0].c == resumed.hooks[0].c != 0
    assert all(a.equal(b) for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True))


def test_with_dropout_no_gradient_is_kept():
    hook = corrected()
    trained = fit(run(hook, model=dropping()))
    assert not hook.kept
    assert trained.bill("correction").backward == trained.bill("full gradient").backward == 5 * N


def test_when_all_is_done_nothing_watches_the_model():
    hook = corrected()
    trained = fit(run(hook, model=dropping()))
    assert trained.model._forward_pre_hooks
    hook.close()
    assert not trained.model._forward_pre_hooks


def cosines_on(worker):
    """Return the cosines of a training with dropout on this worker."""
    hook = corrected()
    trained = run(hook, model=dropping(), epochs=2)
    trained.worker = worker
    fit(trained)
    return [row[2] for row in hook.history], [parameter.tolist() for parameter in trained.model.parameters()]


def test_each_worker_repeats_its_own_draws():
    (first, weights), (second, same) = on_workers(2, cosines_on)
    assert first == second and weights == same
    assert [first[0], first[6]] == pytest.approx([1.0, 1.0], abs=1e-5)  # right after a snapshot
    assert min(first) < 0.9999


class Numpy(nn.Linear):
    """Draws from a generator that nobody sets back."""

    def forward(self, x):
        return super().forward(x) * float(np.random.rand())


def test_draws_that_cannot_be_repeated_are_refused():
    with pytest.raises(UserError, match="agent: the model gives one batch two outputs with torch's generators set"):
        fit(run(Correction(AgentOptions()), model=Numpy(D, C)))
    with pytest.raises(UserError, match=r"does not go with train\.compile = true"):
        fit(run(Correction(AgentOptions()), model=dropping(), compile=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@DRAWING
def test_on_a_gpu_too_dropout_leaves_exactly_the_full_gradient(build):
    after, hook = Gradients(50), corrected()
    trained = run(hook, after, model=build(), precision="float64", epochs=1)
    device = torch.device("cuda")
    fit(dataclasses.replace(trained, worker=Worker(device=device)))
    full = torch.cat([gradient.flatten() for gradient in hook.full])
    torch.testing.assert_close(after.seen[0], full, rtol=0, atol=1e-12)


@DRAWING
@pytest.mark.parametrize(
    "settings", [{"micro_batch": 5}, {"label_smoothing": 0.2}, {"micro_batch": 5, "label_smoothing": 0.2}]
)
def test_the_snapshot_takes_the_parts_and_the_objective_of_the_model(build, settings):
    """θ = θ̃: the two gradients are one, and γc = 1 leaves g̃."""
    after, hook = Gradients(50), corrected()
    fit(run(hook, after, model=build(), precision="float64", epochs=1, **settings))
    full = torch.cat([gradient.flatten() for gradient in hook.full])
    torch.testing.assert_close(after.seen[0], full, rtol=0, atol=1e-14)
    assert hook.history[0][2] == pytest.approx(1.0, abs=1e-14)  # the cosine

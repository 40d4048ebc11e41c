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
from raypkg.methods.agent.control_variate import Weight, coefficient, spread, variance_left
from raypkg.methods.agent.hook import Correction
from raypkg.methods.agent.settings import AgentOptions
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage
from sparse_training import PLAIN, STEPS, C, D, N, batch, network, rng, run, sparse, split


def test_c_is_the_ratio_of_covariance_and_variance():
    snapshot, noise = torch.randn(2, 500, generator=rng())
    current = 0.7 * snapshot + 0.1 * noise
    expected = np.cov(current, snapshot)[0, 1] / np.var(snapshot.numpy(), ddof=1)
    assert coefficient(current, snapshot) == pytest.approx(expected, rel=1e-6)
    assert coefficient(current, torch.ones(500)) == 0.0


def two_gradients(steps, drift=0.0, seed=0):
    """Return gradients of model and snapshot over steps: correlated noise, and a drift of the model's."""
    noise, own = torch.randn(2, steps, 50, generator=rng(seed), dtype=torch.float64)
    current = 0.6 * noise + 0.3 * own + drift * torch.linspace(0, 1, steps)[:, None]
    return current, 2 * noise


def moments_of(current, snapshot):
    steps = range(1, len(current))
    layers = [(walk[:, :30], walk[:, 30:]) for walk in (current, snapshot)]
    pairs = [[[layer[i - offset] for layer in walk] for offset in (0, 1) for walk in layers] for i in steps]
    return torch.stack([spread(*pair) for pair in pairs])


def test_moments_are_those_of_the_noise_without_the_drift():
    """Var = 50·(0.36 + 0.09), Cov = 50·1.2, Var at the snapshot = 50·4, over the layers of 30 and 20."""
    for drift in (0.0, 30.0):
        variance, covariance, at_snapshot = moments_of(*two_gradients(4000, drift)).mean(0)
        assert variance.tolist() == pytest.approx([30 * 0.45, 20 * 0.45], rel=0.05)
        assert covariance.tolist() == pytest.approx([30 * 1.2, 20 * 1.2], rel=0.05)
        assert at_snapshot.tolist() == pytest.approx([30 * 4, 20 * 4], rel=0.05)


def test_the_variance_left_is_that_of_the_corrected_gradient_and_the_measured_weight_leaves_the_least():
    """1 − Σ Cov² / Var at the snapshot / Σ Var, over the layers."""
    current, snapshot = two_gradients(2000)
    variance, covariance, at_snapshot = moments = moments_of(current, snapshot).sum(0)
    for weight in (0.0, 0.3, 1.0):
        after, before = variance_left(moments, torch.full((2,), weight, dtype=torch.float64))
        corrected = current - weight * snapshot
        expected = (corrected.var(0).sum() / current.var(0).sum()).item()
        assert (after / before).item() == pytest.approx(expected, rel=0.05)
    measured = Weight(AgentOptions(form="measured", gamma=1.0, alpha=1.0))
    measured.observe(moments)
    least, before = variance_left(moments, measured.weights(2))
    expected = 1 - (covariance**2 / at_snapshot).sum().item() / variance.sum().item()
    assert (least / before).item() == pytest.approx(expected)


def test_the_measured_weight_begins_at_one_and_follows_the_latest_steps():
    weight = Weight(AgentOptions(form="measured", gamma=0.5, alpha=0.25))
    assert weight.weights(2).tolist() == [0.5, 0.5] and weight.c == 1
    weight.observe(torch.tensor([[9.0, 9.0], [1.0, 0.0], [2.0, 0.0]]))
    assert weight.weights(2).tolist() == [0.5 * 1.75 / 2, 0.0]  # of 2 → 1; a layer without variance is not corrected
    weight.restart(0.5)
    assert weight.c == 1


def test_moments_do_not_depend_on_where_gradients_lie_in_memory():
    draws = torch.Generator().manual_seed(0)
    a, b, zero = torch.randn(3, 1001, generator=draws)
    found = set()
    for offset in range(16):  # DDP moves gradients between its buckets
        moved = torch.empty(1040)[offset : offset + 1001].copy_(a)
        found.add(spread([moved], [b], [zero], [zero])[1].item())
    assert len(found) == 1


@pytest.mark.parametrize("damped", [0.3, 1.0])
def test_it_equals_the_loop_written_out(damped):
    settings = PLAIN.model_copy(update={"precision": "float64", "momentum": 0.0, "nesterov": False})
    hook, model = corrected(gamma=damped), network().double()
    twin = copy.deepcopy(model)

    everything = Coreset.uniform(torch.arange(N))
    stream = Batches(split(), everything, 16, seed=0, augment=(), worker=Worker(), dtype=torch.float64)
    trained = fit(run(hook, settings=settings, model=model))
    batches = [[(batch.x, batch.y) for batch in stream.epoch(epoch)] for epoch in range(5)]
    reference.corrected_sgd(twin, batches.__getitem__, 0.1, damped, epochs=5)
    torch.testing.assert_close([*trained.model.parameters()], [*twin.parameters()], rtol=0, atol=1e-12)


def test_the_full_gradient_is_of_the_objective_where_batches_differ_in_size():
    hook, model = corrected(), network().double()
    x, y = batch(N)
    expected = torch.autograd.grad(F.cross_entropy(model(x.double()), y), list(model.parameters()))
    fit(run(hook, model=model, precision="float64", batch_size=14, epochs=1))  # of 13 and 14 samples
    torch.testing.assert_close(hook.agent.full, list(expected), rtol=1e-5, atol=1e-7)


def test_kept_gradients_are_those_that_would_be_computed_again(monkeypatch):
    kept, again = (Correction(AgentOptions(form="measured", always=True)) for _ in range(2))
    one = fit(run(*sparse(correction=[kept])))
    monkeypatch.setattr("raypkg.methods.agent.hook.memory_bound", lambda memory: 0)
    other = fit(run(*sparse(correction=[again])))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    np.testing.assert_array_equal(np.array(kept.history)[:, :4], np.array(again.history)[:, :4])
    assert list(kept.kept) == list(range(STEPS - STEPS // 5, STEPS)) and not again.kept
    assert one.bill("correction").backward == 0 and one.bill("full gradient").backward == 5 * N
    assert other.bill("correction").backward == 5 * N
    assert (kept.line, again.line) == (1 / 2, 1 / 3)


@pytest.mark.parametrize("other", ["supplier", "dropout"])
def test_gradients_are_not_kept_if_steps_may_see_others(other):
    hook, supplier = corrected(), Hook()
    supplier.supplies_batches = True
    trained = fit(run(hook, supplier) if other == "supplier" else run(hook, model=dropping()))
    assert hook.agent.full and not hook.kept
    assert trained.bill("correction").backward == trained.bill("full gradient").backward == 5 * N


class Attentive(nn.Module):
    """Drops units within attention, not in a layer of its own."""

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
    """A correction at full weight from the first step on: SVRG."""
    return Correction(AgentOptions(form="measured", always=True, alpha=0.0, **options))


class Gradients(Hook):
    """Keeps the gradient of every step, after the hooks before it."""

    def __init__(self, order):
        self.priority = order
        self.seen = []

    def on_gradients(self, run):
        self.seen.append(torch.cat([parameter.grad.flatten() for parameter in run.model.parameters()]))


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@DRAWING
@pytest.mark.parametrize("settings", [{}, {"micro_batch": 5, "label_smoothing": 0.2}])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def test_at_the_snapshot_dropout_leaves_exactly_the_full_gradient(build, settings, device):
    """θ = θ̃, the same masks, parts and objective: the two gradients are equal, and γc = 1 leaves g̃."""
    raw, after, hook = Gradients(0), Gradients(50), corrected()
    trained = run(raw, hook, after, model=build(), precision="float64", epochs=1, **settings)
    fit(dataclasses.replace(trained, worker=Worker(device=torch.device(device))))
    full = torch.cat([gradient.flatten() for gradient in hook.agent.full])
    assert not raw.seen[0].allclose(full)
    torch.testing.assert_close(after.seen[0], full, rtol=0, atol=1e-14 if device == "cpu" else 1e-12)


def test_the_full_gradient_has_dropout_of_its_own():
    hooks = [corrected(), corrected()]
    for epochs, hook in enumerate(hooks, 1):  # the last epoch's
        fit(run(hook, model=dropping(), lr=1e-9, epochs=epochs, batch_size=96))
    assert not any(a.allclose(b, rtol=1e-3) for a, b in zip(*(hook.agent.full for hook in hooks), strict=True))


def test_each_worker_repeats_its_own_draws_in_every_step():
    (first, weights), (second, same) = on_workers(2, dropping_on)
    np.testing.assert_array_equal(first, second)
    assert weights == same
    assert np.nanmax(np.array(first)[:, 3]) < 1e-3  # weights hardly move: with other draws much would be left


def dropping_on(worker):
    """Return the history of a correction on this worker, and the weights."""
    hook = corrected()
    trained = fit(dataclasses.replace(run(hook, model=dropping(), epochs=2, lr=1e-5), worker=worker))
    return hook.history, [parameter.tolist() for parameter in trained.model.parameters()]


def test_draws_that_cannot_be_repeated_are_refused():
    model = nn.Linear(D, C)
    model.register_forward_hook(lambda layer, inputs, output: output * float(np.random.rand()))
    with pytest.raises(UserError, match="agent: the model gives one batch two outputs with torch's generators set"):
        fit(run(Correction(AgentOptions(form="measured")), model=model))
    with pytest.raises(UserError, match=r"does not go with train\.compile = true"):
        fit(run(Correction(AgentOptions(form="measured")), model=dropping(), compile=True))


class Rates(Hook):
    """Sets the learning rate of each epoch."""

    def __init__(self, *rates):
        self.rates = rates

    def on_gradients(self, run):
        for group in run.optimizer.param_groups:
            group["lr"] = self.rates[run.epoch]


def corrected_by_epoch(hook):
    """Return the epochs with corrected steps, and those with looks."""
    per_epoch = STEPS // 5
    epochs = [{int(row[0]) // per_epoch for row in hook.history if row[1] == flag} for flag in (1, 0)]
    return [sorted(each) for each in epochs]


def test_a_worthwhile_correction_starts_after_one_look():
    hook = Correction(AgentOptions(form="measured"))
    trained = fit(run(hook, lr=1e-3))
    assert corrected_by_epoch(hook) == [[1, 2, 3, 4], [0]]
    assert trained.bill("full gradient").backward == 4 * N
    results = hook.results(trained)
    assert results.facts["variance_left"] < results.facts["variance_line"] == 0.5
    assert results.facts["corrected_steps"] == 24


def test_a_correction_that_is_not_worthwhile_changes_nothing_bit_for_bit(tmp_path):
    """Weights move far within an epoch: it only looks, in the first epoch and in the fifth."""
    model = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, C))
    plain = fit(run(model=copy.deepcopy(model), lr=3.0))
    hook = Correction(AgentOptions(form="measured"))
    hook.switch.every = 3
    with_it = fit(run(hook, model=copy.deepcopy(model), lr=3.0))
    for name, value in plain.model.state_dict().items():
        assert value.equal(with_it.model.state_dict()[name]), name
    assert corrected_by_epoch(hook) == [[], [0, 4]]
    assert with_it.bill("correction").backward == 2 * 2 * 16  # a pair of batches a look
    assert not with_it.bill("full gradient").backward
    results = hook.results(with_it)
    (finding,) = results.findings
    assert "AGENT corrected no step, which would leave" in finding and "3 times as large" in finding
    results.plots["correction"](tmp_path / "correction.png")
    assert (tmp_path / "correction.png").stat().st_size > 1000


def test_it_switches_on_after_the_rate_has_fallen_and_off_above_the_line():
    hook = Correction(AgentOptions(form="measured"))
    hook.switch.every = 100
    rates = Rates(3.0, 3.0, 1e-3, 1e-3, 3.0)
    fit(run(rates, hook, lr=3.0))
    assert corrected_by_epoch(hook) == [[4], [0, 3]]  # seen at the next snapshot, where the look begins
    hook = Correction(AgentOptions(form="measured"))
    fit(run(Rates(1e-3, 3.0, 3.0, 3.0, 3.0), hook, lr=1e-3))
    assert corrected_by_epoch(hook) == [[1], [0]]


@pytest.mark.parametrize("form", ["published", "linear"])
def test_other_forms_never_switch_off(form):
    hook = Correction(AgentOptions(form=form))
    trained = fit(run(hook, lr=3.0))
    first = 1 if form == "published" else 0  # c is 0 before
    assert corrected_by_epoch(hook)[0] == list(range(first, 5)) and len(hook.history) == STEPS - 6 * first
    assert trained.bill("full gradient").backward == N * (5 - first)
    assert hook.results(trained).facts["variance_left"] > 0.5
    if form == "linear":
        weights = sorted({(int(row[0]) // 6, row[2]) for row in hook.history})
        assert [weight for _, weight in weights] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("last", [1, 2, 3])
@pytest.mark.parametrize(
    ("options", "rate", "build"),
    [
        ({"form": "measured"}, 0.05, network),
        ({"form": "measured"}, 3.0, network),
        ({"form": "linear"}, 0.05, network),
        ({"form": "published", "gamma": 0.5, "alpha": 0.5}, 0.1, dropping),
        ({"form": "measured", "always": True}, 0.1, attentive),
    ],
)
def test_stopped_and_resumed_equals_never_stopped(tmp_path, options, rate, build, last):
    def start(stop):
        trained = run(Correction(AgentOptions(**options)), model=build(), lr=rate, schedule="cosine", momentum=0.5)
        trained.last = stop
        return trained

    straight = fit(start(None))
    kept = StoredCheckpoints(Storage(str(tmp_path)) / "kept")
    fit(start(last), checkpoints=kept)
    resumed = fit(start(None), checkpoints=kept)
    assert all(a.equal(b) for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True))
    np.testing.assert_array_equal(straight.hooks[0].history, resumed.hooks[0].history)
    assert str(straight.hooks[0].results(straight).facts) == str(resumed.hooks[0].results(resumed).facts)


def test_a_checkpoint_of_an_earlier_version_is_restored():
    measured, published = Weight(AgentOptions(form="measured")), Weight(AgentOptions(form="published"))
    measured.load_state_dict({"sums": torch.tensor([[1.0], [2.0]])}, torch.device("cpu"))
    published.load_state_dict({"c": 0.5, "losses": [torch.ones(2)]}, torch.device("cpu"))
    assert (float(measured.c), published.c) == (0.5, 0.5)
    hook = Correction(AgentOptions(form="measured"))
    fit(run(hook, epochs=1))
    switch = {"on": True, "looks": False, "rate": 0.1, "epoch": 3}
    hook.load_state_dict(hook.state_dict() | {"form": {"sums": None}, "switch": switch})
    assert (hook.switch.on, hook.switch.epoch, hook.switch.every) == (True, 3, 4)


def test_settings_that_would_do_nothing_are_refused():
    for options, message in (
        ({"form": "linear", "alpha": 0.5}, r"agent\.form = linear .* agent\.alpha would do nothing"),
        ({"form": "published", "always": True}, r"form = published .* agent\.always would do nothing"),
        ({"form": "published", "alpha": 0.0}, r"agent\.alpha = 0 with form = published would correct nothing"),
    ):
        with pytest.raises(UserError, match=message):
            AgentOptions(**options)

"""CREST: its formulas against dense ones, and the hook against the paper's loop."""

import math
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import reference
from gloo import on_workers
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import Training
from raypkg.coresets.record import Recorder
from raypkg.data.kinds import TEXTS
from raypkg.data.split import Split
from raypkg.engine.loop import fit
from raypkg.engine.run import Hook, Run
from raypkg.methods.crest import quadratic
from raypkg.methods.crest.hook import Crest
from raypkg.methods.crest.quadratic import MovingMoments, Region, flat, gradient_of, hessian_diagonal
from raypkg.methods.crest.selection import ActiveSamples, minibatch_coreset
from raypkg.methods.crest.settings import CrestOptions
from raypkg.models import build_model
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage

N, SIZE = 120, 8
ONE_LOW_LOSS = {"exclude_after": 1, "keep_active": 0.0}  # excludes within a few epochs
FAST = {  # the local model of preset `fast`, which takes fewer samples than the published one
    "checked_on": "pool", "smoothing": "coreset", "settle": 0.05, "model_batches": 1, "curvature": None,
    "exclude_after": 5, "keep_active": 0.8,
}  # fmt: skip
PLAIN = Training(epochs=4, batch_size=SIZE, lr=0.05, precision="float32", schedule="constant", nesterov=False)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_medoids_and_weights_equal_brute_force(seed, dtype):
    p = reference.problem(50, 5, 7, seed=seed, dtype=dtype)
    logits = reference.logits(p.head, p.features)
    medoids, shares = reference.minibatch(logits, p.y, 12)
    picked = minibatch_coreset(logits, p.y, 12)
    assert picked.indices.tolist() == medoids
    torch.testing.assert_close(picked.weights, torch.tensor(shares) * 12 / 50)
    whole = minibatch_coreset(logits, p.y, 51)  # more than there are: the subset itself
    assert (whole.indices.tolist(), whole.weights.tolist()) == (list(range(50)), [1.0] * 50)


def small_net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 2
    return list(model.parameters()), lambda: F.cross_entropy(model(x), y)


def test_hutchinson_is_z_times_hz_and_its_mean_the_diagonal():
    parameters, loss = small_net()
    dense = reference.dense_hessian(loss, parameters)
    estimates = []
    for draw in range(400):
        estimate = hessian_diagonal(loss(), parameters, partial(generator, draw))
        rng = generator(draw)
        z = torch.cat([torch.randint(2, p.shape, generator=rng).flatten() * 2.0 - 1 for p in parameters]).double()
        torch.testing.assert_close(estimate, (z * (dense @ z)).float())
        estimates.append(estimate)
    error = (torch.stack(estimates).mean(dim=0) - dense.diag()).norm() / dense.diag().norm()
    assert error < 4 * (dense - dense.diag().diag()).norm() / dense.diag().norm() / 400**0.5


def test_the_local_model_of_a_separable_quadratic_loss_is_the_loss():
    w = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    bend = torch.tensor([1.0, 2.0, 4.0])

    def loss(at):
        return 3 + 0.5 * (bend * at.square()).sum()

    gradient, diagonal = gradient_of(loss(w), [w]), hessian_diagonal(loss(w), [w], partial(generator, 0))
    assert diagonal.tolist() == bend.tolist()
    anchor, delta = w.detach(), torch.tensor([0.3, -0.1, 2.0])
    zero = torch.zeros(3)
    quadratic = Region(MovingMoments(zero, zero).updated(gradient, diagonal), anchor)
    linear = Region(MovingMoments(zero, None).updated(gradient, None), anchor)
    assert quadratic.prediction(anchor + delta, float(loss(anchor))) == pytest.approx(float(loss(anchor + delta)))
    assert linear.prediction(anchor + delta, 1.0) == pytest.approx(1 + float(gradient @ delta))


def test_moments_are_bias_corrected_means():
    zero, rows = torch.zeros(4), torch.randn(6, 2, 4)
    moments = MovingMoments(zero, zero)
    for gradient, diagonal in rows:
        moments = moments.updated(gradient, diagonal)
    means = (moments.gradient, 0.9, rows[:, 0]), (moments.diagonal.square(), 0.999, rows[:, 1].square())
    for found, beta, values in means:
        weights = torch.tensor([beta ** (5 - s) for s in range(6)])
        torch.testing.assert_close(found, weights @ values / weights.sum(), rtol=1e-4, atol=1e-6)
    latest = MovingMoments(zero, zero, betas=(0.0, 0.0)).updated(*rows[0]).updated(*rows[1])
    assert latest.gradient.equal(rows[1, 0])
    torch.testing.assert_close(latest.diagonal, rows[1, 1].abs())


def test_an_unused_parameter_has_no_gradient_and_no_curvature():
    used, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    parameters = [used, unused]
    assert gradient_of((used**3).sum(), parameters).tolist() == [3, 3, 0, 0]
    assert hessian_diagonal((used**3).sum(), parameters, partial(generator, 0)).tolist() == [6, 6, 0, 0]


def test_rho_and_interval_by_hand():
    assert quadratic.relative_error(float("nan"), 1.0) == float("inf")
    assert quadratic.relative_error(1.5, 2.0) == 0.25
    assert (quadratic.relative_error(0.0, 0.0), quadratic.relative_error(0.1, 0.0)) == (0.0, float("inf"))
    for loss in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="the loss became"):
            quadratic.relative_error(1.0, loss)
    norms = ((2, 3.0, 1.5), (0.1, 1.0, 1.0), (3, 0.0, 1.0), (1, 4.0, 3.0))
    assert [quadratic.check_interval(*each) for each in norms] == [4, 1, 3, 2]


def active_after(*losses, alpha=0.1, after=0, least=1):
    """Return 1 for each sample that is active after steps with these losses and T2 = 2; None = no loss."""
    options = CrestOptions(exclude_every_steps=2, exclude_after=after)
    samples = ActiveSamples.all_of(torch.arange(len(losses[0])))
    for step, row in enumerate(losses, start=1):
        seen = torch.tensor([i for i, loss in enumerate(row) if loss is not None], dtype=torch.int64)
        samples.record(seen, torch.tensor([loss for loss in row if loss is not None]), alpha)
        samples.exclude(step, options, least=least)
    return samples.active.int().tolist()


def test_by_the_papers_rule_a_sample_is_excluded_if_all_its_losses_are_low():
    rows = [[0.05, 0.5, None], [0.05, 0.05, None]]
    assert active_after(*rows) == [0, 1, 1]
    assert active_after(*rows, least=3) == [1, 1, 1]  # too few would be left
    assert active_after(*rows, alpha=0.0) == [1, 1, 1]
    assert active_after([0.5, 0.05], [0.05, 0.5], [0.05, None]) == [1, 1]  # T2 has not passed again
    assert active_after([0.5, 0.05], [0.05, 0.5], [0.05, None], [None, None]) == [0, 1]


def test_with_a_window_a_sample_is_excluded_after_that_many_low_losses_in_a_row():
    rows = [[0.05, 0.05, 0.05, 0.0], [None, 0.5, 0.05, 0.5], [0.05, 0.05, 0.5, 0.05], [0.05, 0.05, 0.05, 0.05]]
    assert active_after(*rows, after=3) == [0, 1, 1, 1]


def split():
    p = reference.problem(N, 3, 5, dtype=torch.float32)
    return Split.from_tensors(p.features, torch.arange(N) % 3)


def whole(data):
    """Return all samples as a model receives them, and their labels."""
    x, y = data.batch(torch.arange(N))
    return data.inputs(x), y


def run(options, training=PLAIN, *, data=None, model="mlp", worker=None, hooks=(), augment=(), **model_options):
    data = data or split()
    hooks = [Recorder(data.y), Crest(options, torch.arange(N), SIZE), *hooks]
    built = build_model(model, data.shape, 3, seed=0, options=model_options)
    return Run.simple(built, data, training, hooks=hooks, augment=augment, worker=worker)


def fast(**settings):
    return CrestOptions(**FAST | settings)


@cache
def trained_with(**settings):
    """Return a finished training, shared by all tests, which only read it."""
    return fit(run(fast(**settings)))


def state_of(trained):
    return trained.hooks[1].algorithm.state


def rows_of(trained, key):
    return [row[key] for row in state_of(trained).history]


def rhos(trained):
    return rows_of(trained, "rho")


def same_weights(a, b, tolerance=0.0):
    return torch.allclose(flat(a.model.parameters()), flat(b.model.parameters()), rtol=0, atol=tolerance)


def bills_of(trained):
    return {bill.phase: bill for bill in trained.bills()}


def test_the_hook_follows_the_papers_loop():
    options = CrestOptions(tau=0.12, h=3, b=2, subset=0.3, exclude_every_steps=5, exclude_below=0.4)
    trained = fit(run(options, model="linear"))
    twin = build_model("linear", (5,), 3, seed=0)
    errors = reference.crest(twin, *whole(split()), options, PLAIN, 0, SIZE, 36)
    # The twin's last check may come at the end of training, within a region.
    torch.testing.assert_close(rhos(trained), errors[: len(rhos(trained))], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(flat(trained.model.parameters()), flat(twin.parameters()), rtol=1e-3, atol=1e-4)
    last = state_of(trained).history[-1]
    assert last["update"] > 2 and last["active"] < N and max(rows_of(trained, "interval")) > 1


EACH_STEP = {"tau": 0.0, "subset": 0.3, "exclude_below": 0.0}


def test_without_a_local_model_every_step_trains_on_medoids_that_its_weights_choose():
    trained = trained_with(**EACH_STEP)
    twin = build_model("mlp", (5,), 3, seed=0)
    reference.crest_each_step(twin, *whole(split()), PLAIN, 0, SIZE, 36)
    torch.testing.assert_close(flat(trained.model.parameters()), flat(twin.parameters()), rtol=1e-3, atol=1e-4)
    bills, steps = bills_of(trained), PLAIN.epochs * 15
    assert (bills["train"].backward, bills["select"].forward) == (steps * SIZE, steps * 36)
    assert not {"check", "model"} & {phase for phase, bill in bills.items() if bill.forward}
    assert state_of(trained).pool.update == steps and rows_of(trained, "step") == [20, 40, 60]


def test_without_a_local_model_samples_are_excluded_by_the_losses_of_choices():
    trained = trained_with(**EACH_STEP | {"exclude_below": 0.5, "exclude_every_steps": 7}, **ONE_LOW_LOSS)
    active = rows_of(trained, "active")
    assert active[0] == N and active[-1] < N
    everything = trained_with(tau=0.05, subset=0.3, exclude_below=1e9, exclude_every_steps=1, **ONE_LOW_LOSS)
    assert 2 * 36 <= int(state_of(everything).samples.active.sum()) < N  # two random subsets stay


def trained_by(worker, settings):
    trained = fit(run(fast(**settings), worker=worker))
    return flat(trained.model.parameters()), trained.hooks[1].counts, state_of(trained).history


@pytest.mark.parametrize("settings", [{"tau": 0.05, "h": 2, "subset": 0.3}, EACH_STEP], ids=["τ 0.05", "τ 0"])
def test_the_number_of_workers_does_not_matter(settings):
    one = trained_with(**settings)
    for weights, counts, history in on_workers(2, trained_by, settings):
        torch.testing.assert_close(weights, flat(one.model.parameters()), rtol=0, atol=1e-5)
        assert counts.equal(one.hooks[1].counts)
        found, expected = ([row.get("rho") for row in rows] for rows in (history, state_of(one).history))
        assert found == pytest.approx(expected, abs=1e-4)


STOPPED = {"tau": 0.1, "h": 4, "subset": 0.3, "exclude_every_steps": 7, "exclude_below": 0.4, **ONE_LOW_LOSS}


@pytest.mark.parametrize("options", [STOPPED, EACH_STEP], ids=["τ 0.1", "τ 0"])
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_stopped_inside_a_region_and_resumed_equals_never_stopped(tmp_path, options, epoch):
    def die(model, now):
        if now == epoch + 1:
            raise KeyboardInterrupt
        return {}

    settings = fast(**options)
    straight = trained_with(**options)
    places = StoredCheckpoints(Storage(str(tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        fit(run(settings), checkpoints=places, measure=die)
    saved = places.load()
    assert saved["step"] == 15 * epoch
    if options["tau"]:
        assert saved["step"] not in rows_of(straight, "step")  # a region has begun
    resumed = fit(run(settings), checkpoints=places)
    assert same_weights(straight, resumed)
    assert state_of(straight).history == state_of(resumed).history
    assert straight.hooks[1].counts.equal(resumed.hooks[1].counts)
    assert all(a.equal(b) for a, b in zip(straight.hooks[1].picked, resumed.hooks[1].picked, strict=True))
    assert sum(bill.backward for bill in straight.bills()) == sum(bill.backward for bill in resumed.bills())


CHANGES = [
    {"order": 1}, {"smoothing": "none"}, {"smoothing": "pool", "model_batches": 3}, {"checked_on": "fresh"},
    {"settle": 0.0}, {"exclude_after": 5}, {"keep_active": 0.9}, {"exclude_below": 0.0},
    {"model_batches": 0}, {"model_batches": 3}, {"b": 1},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_every_switch_switches(change):
    base = {"tau": 0.05, "h": 3, "subset": 0.3, "exclude_every_steps": 5, "exclude_below": 0.5, **ONE_LOW_LOSS}
    trained, other = trained_with(**base), trained_with(**base | change)
    assert rhos(trained) != rhos(other)
    if change.get("model_batches"):  # the averages are updated per coreset or per pool
        per_pool = 1 if change.get("smoothing") == "pool" else 3
        assert state_of(other).region.moments.updates == per_pool * state_of(other).pool.update
    if change == {"exclude_below": 0.0}:
        assert state_of(other).samples.active.all() and not state_of(trained).samples.active.all()


def test_it_trains_a_transformer_on_texts_with_the_curvature_of_attention():
    x, y = TEXTS.example(N, (9, 40)), torch.arange(N) % 3
    data = Split(take=lambda rows: x[rows].numpy(), y=y, classes=("a", "b", "c"), shape=(9, 40), mean=(), std=())
    trained = fit(run(fast(tau=0.05), data=data, model="transformer", width=16, dropout=0.0))
    assert state_of(trained).pool.update > 1
    assert all(math.isfinite(rho) for rho in rhos(trained))


class Fused(nn.Module):
    """Attention by a kernel without a second derivative, whatever the context requests."""

    def forward(self, x):
        heads = x.unflatten(1, (1, 1, -1))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(heads, heads, heads).flatten(1)


def test_a_model_without_a_second_derivative_needs_order_1():
    def trained(order):
        crest = run(fast(tau=0.05, order=order))
        crest.model.features.append(Fused())
        return fit(crest)

    with pytest.raises(UserError, match=r"CREST's curvature cannot be computed: .* set order = 1"):
        trained(order=2)
    assert state_of(trained(order=1)).pool.update


class Kept(Hook):
    """Keeps the batch of each step."""

    def __init__(self):
        self.batches_seen = []

    def on_gradients(self, run):
        self.batches_seen.append(run.batch)


def trained_on_images():
    """Return the training, its batches, and (subset, coreset) of every choice."""
    pixels = torch.randint(256, (N, 3, 8, 8), generator=generator(0, "pixels"), dtype=torch.uint8)
    data, kept, seen = Split.from_tensors(pixels, torch.arange(N) % 3), Kept(), []
    options = fast(tau=1e-9, subset=0.3, b=1)
    started = run(options, data=data, hooks=[kept], augment=("crop", "flip"))
    loop = started.hooks[1].loop
    choose = loop.choose

    def watched(subsets, weights):
        seen.extend(zip(subsets, chosen := choose(subsets, weights), strict=True))
        return chosen

    loop.choose = watched
    return fit(started), kept.batches_seen, seen


def test_training_sees_the_augmented_images_of_the_selection():
    run, batches, seen = trained_on_images()
    (subset, chosen), batch, data = seen[0], batches[0], run.split
    pixels, y = chosen.samples.split(data, run.augment).batch(torch.arange(SIZE))
    plain, _ = data.batch(chosen.coreset.indices)
    inputs = {i: x for i, x in zip(chosen.coreset.indices.tolist(), data.inputs(pixels), strict=True)}
    assert all(x.equal(inputs[i]) for i, x in zip(batch.indices.tolist(), batch.x, strict=True))
    assert not pixels.equal(plain) and y.equal(data.y[chosen.coreset.indices])
    model = build_model("mlp", data.shape, 3, seed=0)
    logits = model(data.inputs(subset.split(data, run.augment).batch(torch.arange(len(subset)))[0])).detach()
    losses = F.cross_entropy(logits, data.y[subset.indices], reduction="none")
    torch.testing.assert_close(chosen.losses, losses, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_regions_first_step_is_that_of_its_local_model(monkeypatch):
    settings = {"tau": 0.05, "h": 2, "subset": 0.3, "curvature": 4}
    taken = trained_with(**settings)
    monkeypatch.setattr("raypkg.methods.crest.hook.trains_as_it_evaluates", lambda model: False)
    computed = fit(run(fast(**settings)))
    assert rhos(taken) == pytest.approx(rhos(computed), abs=1e-4)
    assert same_weights(taken, computed)
    saved = bills_of(computed)["model"].backward - bills_of(taken)["model"].backward
    assert saved == state_of(taken).pool.update * SIZE


def test_models_that_train_as_they_evaluate():
    alike = [nn.Linear(2, 2), nn.GroupNorm(1, 2), nn.BatchNorm1d(2).eval(), nn.Dropout(0.0)]
    others = [nn.BatchNorm1d(2), nn.Dropout(0.1), nn.GRU(2, 2, dropout=0.1, num_layers=2)]
    for module in [*alike, *others]:
        model = nn.ModuleList([nn.Linear(1, 1), module])
        assert quadratic.trains_as_it_evaluates(model) is (module in alike)


class Frozen(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(False)


@pytest.mark.parametrize(("norm", "lines"), [(nn.BatchNorm1d, 1), (Frozen, 0)])
def test_batch_norm_is_reported_unless_frozen_and_moves_in_training_only(caplog, norm, lines):
    trained = run(fast(tau=0.05, subset=0.3))
    trained.model.features = nn.Sequential(trained.model.features, norm(trained.model.head.in_features))
    fit(trained)
    assert sum("batch norm" in record.message for record in caplog.records) == lines
    assert sum("batch norm" in line for line in trained.hooks[1].results(trained).findings) == lines
    # Checks and local models use evaluation mode and leave no trace.
    assert int(trained.model.features[1].num_batches_tracked) == 60 * lines
    assert trained.model.training

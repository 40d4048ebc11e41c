"""CREST: its formulas against dense ones, and the hook against the paper's loop."""

import functools
import itertools
import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import reference
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import Training
from raypkg.coresets.recorder import Recorder
from raypkg.coresets.sharded import LiveModel
from raypkg.data import Data
from raypkg.data.kinds import TEXTS
from raypkg.data.split import Split
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.engine.shards import LocalShards, Shard
from raypkg.methods.crest.active import remaining
from raypkg.methods.crest.hook import Crest
from raypkg.methods.crest.minibatch import minibatch_coreset
from raypkg.methods.crest.quadratic import MovingMoments, flat, gradient_of, hessian_diagonal, predicted, relative_error
from raypkg.methods.crest.region import check_interval
from raypkg.methods.crest.settings import CrestOptions
from raypkg.methods.crest.state import CrestState
from raypkg.methods.sparse.masked import Masked
from raypkg.models import build_model
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage

N, SIZE = 120, 8
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
    assert picked.weights.sum() == pytest.approx(12)


def test_a_batch_as_large_as_the_subset_is_the_subset():
    picked = minibatch_coreset(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), 9)
    assert (picked.indices.tolist(), picked.weights.tolist()) == ([0, 1, 2, 3], [1.0] * 4)


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
        estimate = hessian_diagonal(loss(), parameters, generator(draw))
        rng = generator(draw)
        z = torch.cat([torch.randint(2, p.shape, generator=rng).flatten() * 2.0 - 1 for p in parameters]).double()
        torch.testing.assert_close(estimate, (z * (dense @ z)).float())
        estimates.append(estimate)
    error = (torch.stack(estimates).mean(dim=0) - dense.diag()).norm() / dense.diag().norm()
    assert error < 4 * (dense - dense.diag().diag()).norm() / dense.diag().norm() / 400**0.5


def test_the_model_is_the_loss_where_the_loss_is_quadratic_and_separable():
    w = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    bend = torch.tensor([1.0, 2.0, 4.0])

    def loss(at):
        return 3 + 0.5 * (bend * at.square()).sum()

    gradient, diagonal = gradient_of(loss(w), [w]), hessian_diagonal(loss(w), [w], generator(0))
    assert diagonal.tolist() == bend.tolist()
    delta = torch.tensor([0.3, -0.1, 2.0])
    assert predicted(float(loss(w.detach())), gradient, diagonal, delta) == pytest.approx(
        float(loss(w.detach() + delta))
    )
    assert predicted(1.0, gradient, None, delta) == pytest.approx(1 + float(gradient @ delta))


def test_moments_are_bias_corrected_means():
    zero, rows = torch.zeros(4), torch.randn(6, 2, 4)
    moments = MovingMoments(zero, zero)
    for gradient, diagonal in rows:
        moments = moments.updated(gradient, diagonal)
    for found, beta, values in (
        (moments.gradient, 0.9, rows[:, 0]),
        (moments.diagonal.square(), 0.999, rows[:, 1].square()),
    ):
        weights = torch.tensor([beta ** (5 - s) for s in range(6)])
        torch.testing.assert_close(found, weights @ values / weights.sum(), rtol=1e-4, atol=1e-6)
    latest = MovingMoments(zero, zero, betas=(0.0, 0.0)).updated(*rows[0]).updated(*rows[1])
    assert latest.gradient.equal(rows[1, 0])
    torch.testing.assert_close(latest.diagonal, rows[1, 1].abs())


def test_a_parameter_that_is_not_used_has_no_gradient_and_no_curvature():
    used, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    parameters = [used, unused]
    assert gradient_of((used**3).sum(), parameters).tolist() == [3, 3, 0, 0]
    assert hessian_diagonal((used**3).sum(), parameters, generator(0)).tolist() == [6, 6, 0, 0]


def test_rho_by_hand():
    assert relative_error(float("nan"), 1.0) == float("inf")
    assert relative_error(1.5, 2.0) == 0.25
    assert (relative_error(0.0, 0.0), relative_error(0.1, 0.0)) == (0.0, float("inf"))
    for loss in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="the loss became"):
            relative_error(1.0, loss)


def test_interval_by_hand():
    assert [check_interval(h, *norms) for h, *norms in ((2, 3.0, 1.5), (0.1, 1.0, 1.0), (3, 0.0, 1.0))] == [4, 1, 3]


def test_only_samples_seen_with_small_losses_alone_are_dropped():
    active = torch.tensor([True, True, False, True])
    highest = torch.tensor([0.05, 0.5, 0.01, -torch.inf])
    assert remaining(active, highest, 0.1, least=1).tolist() == [False, True, False, True]
    assert remaining(active, highest, 0.1, least=3).equal(active)  # too few would be left


def split():
    p = reference.problem(N, 3, 5, dtype=torch.float32)
    return Split.from_tensors(p.features, torch.arange(N) % 3)


def run(settings, training=PLAIN, holders=1, name="mlp", hooks=()):
    data = split()
    indices = torch.arange(N)
    none = torch.empty(0, dtype=torch.int64)
    shards = LocalShards([Shard(Data(data, data), indices, none, rank=i, world=holders) for i in range(holders)])
    crest = Crest(settings, shards, lambda model: LiveModel(model, "float32"), indices, SIZE)
    model = build_model(name, (5,), 3, seed=0)
    return Run.simple(model, data, training, hooks=[Recorder(data.y), crest, *hooks], augment=())


@functools.cache
def trained_with(holders=1, **settings):
    """Return a whole training, the same to all tests: they only look at it."""
    return fit(run(CrestOptions(**settings), holders=holders))


def state_of(trained):
    return trained.hooks[1].state


def rhos(trained):
    return [row["rho"] for row in state_of(trained).history]


def same_weights(a, b, tolerance=0.0):
    return torch.allclose(flat(a.model.parameters()), flat(b.model.parameters()), rtol=0, atol=tolerance)


def test_the_hook_follows_the_papers_loop():
    settings = CrestOptions(
        tau=0.1, h=3, b=2, subset=0.3, exclude_every_steps=5, exclude_below=0.4, model_batches=0, curvature=0
    )
    trained, data = fit(run(settings, name="linear")), split()
    twin = build_model("linear", (5,), 3, seed=0)
    x, y = data.batch(torch.arange(N))
    x = (x - torch.tensor(data.mean)) / torch.tensor(data.std)
    errors = reference.crest(twin, x, y, settings, PLAIN, 0, SIZE, 36)
    # The last check of the twin may come with the end of training, within a region.
    torch.testing.assert_close(rhos(trained), errors[: len(rhos(trained))], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(flat(trained.model.parameters()), flat(twin.parameters()), rtol=1e-3, atol=1e-4)
    history = state_of(trained).history
    assert history[-1]["update"] > 2 and history[-1]["active"] < N and max(row["interval"] for row in history) > 1


def test_costs_are_those_of_steps_subsets_checks_and_models():
    trained = fit(run(CrestOptions(tau=0.05, h=2, subset=0.3, curvature=4)))
    bills = {bill.phase: bill for bill in trained.bills()}
    state = state_of(trained)
    steps = PLAIN.epochs * 15
    assert bills["train"].backward == steps * SIZE
    assert bills["check"].forward == len(state.history) * 36  # never all samples
    choices = state.picked[0].shape[1] / SIZE
    assert bills["select"].forward == choices * 36
    assert choices <= steps + state.updates  # nothing is chosen that is not drawn, but for the model
    assert bills["model"].backward == state.updates * (SIZE + 4)
    assert int(state.counts.sum()) == steps * SIZE


@pytest.mark.parametrize("holders", [2, 3])
def test_the_number_of_holders_does_not_matter(holders):
    settings = {"tau": 0.05, "h": 2, "subset": 0.3}
    one, many = trained_with(**settings), trained_with(holders=holders, **settings)
    assert same_weights(one, many, 1e-5)
    assert rhos(one) == pytest.approx(rhos(many), abs=1e-4)


class Killed(Exception):
    pass


STOPPED = {"tau": 0.1, "h": 4, "subset": 0.3, "exclude_every_steps": 7, "exclude_below": 0.4}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_stopped_inside_a_region_and_resumed_equals_never_stopped(tmp_path, overlap, epoch):
    def die(model, now):
        if now == epoch + 1:
            raise Killed
        return {}

    settings = CrestOptions(**STOPPED, overlap=overlap)
    straight = trained_with(**STOPPED, overlap=overlap)
    places = StoredCheckpoints(Storage(str(tmp_path)))
    with pytest.raises(Killed):
        fit(run(settings), checkpoints=places, measure=die)
    stopped = run(settings)
    stopped.load_state_dict(places.load())
    assert stopped.step == 15 * epoch
    resumed = fit(run(settings), checkpoints=places)
    assert same_weights(straight, resumed)
    assert rhos(straight) == rhos(resumed)
    assert state_of(straight).counts.equal(state_of(resumed).counts)
    assert all(a.equal(b) for a, b in zip(state_of(straight).picked, state_of(resumed).picked, strict=True))
    assert sum(bill.backward for bill in straight.bills()) == sum(bill.backward for bill in resumed.bills())


def test_some_stop_falls_inside_a_region():
    trained = trained_with(**STOPPED, overlap=False)
    checks = {row["step"] for row in state_of(trained).history}
    assert not {15, 30, 45} <= checks


def test_some_stop_falls_into_a_choice_in_the_background(tmp_path):
    settings = CrestOptions(**STOPPED, overlap=True)
    places = StoredCheckpoints(Storage(str(tmp_path)), keep=4)
    trained = fit(run(settings), checkpoints=places)
    saved = [torch.load(file, weights_only=True)["hooks"][1] for file in sorted(tmp_path.iterdir())[:-1]]
    pools = [pool for state in saved for pool in (state["pool"], state["coming"]) if pool]
    assert any(pool["awaited"] for pool in pools)
    assert not trained.hooks[1].pool.awaited  # at the end nothing is ahead


def test_a_state_is_saved_and_restored_by_its_fields():
    state = state_of(fit(run(CrestOptions(tau=0.1, h=4, subset=0.3, overlap=True))))
    saved = state.saved()
    assert set(saved) == {field.name for field in fields(state)}
    restored = CrestState.restored(saved)
    restored.samples.highest.fill_(0.0)
    torch.testing.assert_close(saved["samples"]["highest"], state.samples.highest, rtol=0, atol=0)  # not shared
    torch.testing.assert_close(restored.saved()["pool"], saved["pool"], rtol=0, atol=0)
    torch.testing.assert_close(restored.saved()["region"]["moments"]["second"], state.region.moments.second)


def test_overlap_trains_an_interval_more_on_an_expired_pool():
    in_line, overlapped = (fit(run(CrestOptions(tau=1e-9, subset=0.3, overlap=overlap))) for overlap in (False, True))
    steps = [[row["step"] for row in state_of(trained).history] for trained in (in_line, overlapped)]
    assert steps[0] == list(range(1, 61))
    assert steps[1] == list(range(1, 61, 2))
    assert not same_weights(in_line, overlapped)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_local_model_begins_at_the_loss_of_its_own_weights(monkeypatch, overlap):
    apart = []
    begin_region = Crest._begin_region

    def watched(hook, run, *arguments):
        begin_region(hook, run, *arguments)
        (chosen,) = hook.pool.chosen.values()
        x, y = run.split.batch(chosen.coreset.indices)
        with torch.no_grad():
            logits = run.model((x - torch.tensor(run.split.mean)) / torch.tensor(run.split.std))
        losses = F.cross_entropy(logits, y, reduction="none")
        apart.append(abs(hook.state.region.loss - float(chosen.coreset.weights @ losses) / SIZE))

    monkeypatch.setattr(Crest, "_begin_region", watched)
    fit(run(CrestOptions(tau=1e-9, b=1, h=0.1, subset=0.3, overlap=overlap)))  # pools of one coreset
    assert len(apart) > 20 and max(apart) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"order": 1},
        {"smoothing": False},
        {"exclude_below": 0.0},
        {"parameters": "head"},
        {"model_batches": 0},
        {"b": 1},
    ],
)
def test_every_switch_switches(change):
    base = {"tau": 0.1, "h": 3, "subset": 0.3, "exclude_every_steps": 5, "exclude_below": 0.5}
    trained, other = trained_with(**base), trained_with(**base | change)
    assert rhos(trained) != rhos(other)
    if change == {"parameters": "head"}:
        assert len(state_of(other).region.anchor) == sum(p.numel() for p in other.model.head.parameters())
    if change == {"exclude_below": 0.0}:
        assert state_of(other).samples.active.all() and not state_of(trained).samples.active.all()


def test_it_combines_with_sparse_training_and_adamw():
    adamw = PLAIN.model_copy(update={"optimizer": "adamw", "lr": 0.01})
    trained = run(CrestOptions(subset=0.3), adamw)
    name, weight = next((n, p) for n, p in trained.model.named_parameters() if p.dim() > 1)
    mask = torch.arange(weight.numel()).reshape(weight.shape) % 3 == 0
    trained.hooks = [*trained.hooks, Masked({name: mask})]
    fit(trained)
    assert not weight[~mask].any() and weight[mask].any()
    assert trained.hooks[0].record.losses.isfinite().any()


def texts():
    x = TEXTS.example(N, (9, 40))
    classes = ("a", "b", "c")
    y = torch.arange(N) % 3
    return Split(take=lambda rows: x[rows].numpy(), y=y, classes=classes, shape=(9, 40), mean=(), std=())


def test_it_trains_a_transformer_on_texts_with_the_curvature_of_attention():
    data, indices, none = texts(), torch.arange(N), torch.empty(0, dtype=torch.int64)
    shards = LocalShards([Shard(Data(data, data), indices, none)])
    crest = Crest(CrestOptions(), shards, lambda model: LiveModel(model, "float32"), indices, SIZE)
    model = build_model("transformer", data.shape, 3, seed=0, options={"width": 16, "dropout": 0.0})
    trained = fit(Run.simple(model, data, PLAIN, hooks=[Recorder(data.y), crest], augment=()))
    assert state_of(trained).updates > 1
    assert all(math.isfinite(rho) for rho in rhos(trained))


class Fused(nn.Module):
    """Attention by a kernel that has no second derivative, whatever is asked for outside."""

    def forward(self, x):
        heads = x.unflatten(1, (1, 1, -1))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(heads, heads, heads).flatten(1)


def test_a_model_without_a_second_derivative_is_told_how_to_go_on():
    def trained(order):
        crest = run(CrestOptions(order=order))
        crest.model.features.append(Fused())
        return fit(crest)

    with pytest.raises(UserError, match=r"CREST's curvature cannot be had: .* give --crest.order 1"):
        trained(order=2)
    assert state_of(trained(order=1)).updates


def test_batch_norm_statistics_are_those_of_training_alone():
    """Checks and models look in evaluation mode and leave no trace."""
    trained = run(CrestOptions(subset=0.3))
    trained.model.features = nn.Sequential(trained.model.features, nn.BatchNorm1d(trained.model.head.in_features))
    fit(trained)
    assert int(trained.model.features[1].num_batches_tracked) == 60
    assert trained.model.training


def test_when_everything_is_learned_nothing_more_is_dropped():
    trained = fit(run(CrestOptions(subset=0.3, exclude_below=1e9, exclude_every_steps=1)))
    assert 2 * 36 <= int(state_of(trained).samples.active.sum()) < N


@pytest.mark.parametrize(
    ("settings", "n", "batch", "size"),
    [({}, 50_000, 128, 500), ({}, 1000, 32, 64), ({}, 40, 32, 40), ({"subset": 0.5}, 1000, 32, 500)],
)
def test_subset_sizes(settings, n, batch, size):
    assert CrestOptions(**settings).subset_size(n, batch) == size


@pytest.mark.parametrize(
    ("settings", "n", "message"),
    [({"subset": 0.01}, 1000, "is 10, fewer than the 32"), ({}, 20, "only 20 samples"), ({"subset": 1.0}, 20, "only")],
)
def test_subsets_that_cannot_be(settings, n, message):
    with pytest.raises(UserError, match=message):
        CrestOptions(**settings).subset_size(n, 32)


def test_a_loss_that_is_not_finite_is_one_line():
    with pytest.raises(UserError, match=r"NaN or infinite.*: lower the learning rate"):
        fit(run(CrestOptions(subset=0.3), PLAIN.model_copy(update={"lr": 1e30})))


def test_random_subsets_and_draws_do_not_depend_on_what_was_computed_before():
    pools = [fit(run(CrestOptions(subset=0.3, h=h))) for h in (1, 1)]
    assert all(a.equal(b) for a, b in itertools.zip_longest(*(state_of(trained).picked for trained in pools)))

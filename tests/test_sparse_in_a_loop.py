"""SparseTraining in a loop of one's own: equal to effray's own run, under what a loop may do, and what it refuses."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raypkg import SparseTraining
from raypkg.core.errors import UserError
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import Batches
from raypkg.engine.loop import fit
from raypkg.engine.worker import Worker
from raypkg.methods.sparse.compute import expanded
from sparse_training import PLAIN, STEPS, C, D, N, batch, network, run, sparse, split

EPOCHS = 5
MOMENTUM = {"lr": 0.1, "momentum": PLAIN.momentum, "nesterov": PLAIN.nesterov}


def stream():
    """Yield x, y of every step of effray's own run."""
    batches = Batches(split(), Coreset.uniform(torch.arange(N)), 16, seed=0, augment=(), worker=Worker())
    return [(part.x, part.y) for epoch in range(EPOCHS) for part in batches.epoch(epoch)]


def attached(model=None, *, fused=True, optimizer=torch.optim.SGD, update_every=4, total_steps=STEPS, **options):
    model = network() if model is None else model
    rates = MOMENTUM if optimizer is torch.optim.SGD else {"lr": 0.01}
    optimizer = optimizer(model.parameters(), **rates, fused=fused)
    options = {"density": 0.3, "update_every": update_every, "total_steps": total_steps, **options}
    return model, optimizer, SparseTraining(model, optimizer, **options)


def train(model, optimizer, data):
    for x, y in data:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def same_masks(first, second):
    return all(mask.equal(second.masks[name]) for name, mask in first.masks.items())


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"growth": "gradient"}, {}),
        ({"growth": "random", "drop": "set"}, {}),
        ({"growth": "momentum", "redistribution": "momentum"}, {}),
        ({"growth": None, "sparse_init": "uniform", "fan_in": "sparse"}, {}),
        ({"growth": None, "sparse_init": "dense", "update_every_steps": 1}, {}),
        ({"growth": "gradient"}, {"clip": 0.5}),
    ],
)
def test_it_equals_effrays_own_run_bit_for_bit(settings, options):
    hooks = sparse(**settings)
    theirs = fit(run(*hooks, **options)).model
    ours = {"sparse_init": "distribution", "update_every_steps": "update_every"}
    model, optimizer, training = attached(**{ours.get(name, name): value for name, value in settings.items()})
    for x, y in stream():
        (F.cross_entropy(model(x), y, reduction="none").sum() / len(y)).backward()
        if options:
            training.mask_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), options["clip"])
        optimizer.step()
        optimizer.zero_grad()
    assert same(model, theirs) and same_masks(training, hooks[0].sparse)
    assert training.step == STEPS and training.explored == hooks[0].sparse.explored
    existing = model.get_parameter(next(iter(training.masks)))
    assert not existing[~next(iter(training.masks.values()))].any() and 0.29 < training.density < 0.31


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_pruned_weights_and_their_state_are_zero_at_every_step(optimizer):
    model, optimizer, training = attached(optimizer=optimizer)
    for pair in stream():
        train(model, optimizer, [pair])
        for name, mask in training.masks.items():
            weight = model.get_parameter(name)
            state = [value for value in optimizer.state[weight].values() if value.shape == weight.shape]
            assert state and not any(value[~mask].any() for value in [weight, *state])


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
@pytest.mark.parametrize("stop", [3, 8, 14])
def test_stopped_within_an_epoch_and_resumed_equals_never_stopped(stop, growth):
    straight, optimizer, whole = attached(growth=growth)
    train(straight, optimizer, stream())
    first = attached(growth=growth)
    train(*first[:2], stream()[:stop])
    kept = io.BytesIO()
    torch.save([each.state_dict() for each in first], kept)
    kept.seek(0)
    again = attached(nn.Sequential(network())[0], growth=growth)
    for each, state in zip(again, torch.load(kept), strict=True):
        each.load_state_dict(state)
    train(*again[:2], stream()[stop:])
    assert same(straight, again[0]) and same_masks(whole, again[2]) and whole.explored == again[2].explored


def test_a_state_is_restored_in_its_order_only():
    model, optimizer, training = attached()
    train(model, optimizer, stream()[:10])
    masks = copy.deepcopy(training.masks)
    for other, density, state, message in (
        (network(), 0.3, training.state_dict(), r"not zero, not \d+: make SparseTraining first"),
        (nn.Linear(D, C), 0.3, training.state_dict(), r"is of another model: \S+weight is missing in one or has"),
        (model, 0.2, training.state_dict(), "SparseTraining with density = 0.3, this one has 0.2"),
        (network(), 0.3, model.state_dict(), "no state of a SparseTraining: it has no 'masks'"),
    ):
        training.detach()  # its model may be attached again
        later = attached(other, density=density)[2]
        before = copy.deepcopy(later.masks)
        with pytest.raises(UserError, match=message):
            later.load_state_dict(state)
        assert all(mask.equal(later.masks[name]) for name, mask in before.items()) and later.step == 0
    assert all(mask.equal(training.masks[name]) for name, mask in masks.items())


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("by_hand", [True, False])
def test_a_grad_scaler_changes_nothing_and_skipped_steps_do_not_count(fused, by_hand, growth):
    plain, optimizer, expected = attached(growth=growth, fused=fused)
    train(plain, optimizer, stream())
    model, optimizer, training = attached(growth=growth, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)  # powers of two change no bit
    overflows = {4: "weight", 5: "weight", 8: "bias", 20: "weight"}  # before these steps, once
    for x, y in stream():
        for overflow in [overflows.pop(training.step), None] if training.step in overflows else [None]:
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            if overflow:
                next(p for name, p in model.named_parameters() if overflow in name).grad[0] = torch.inf
            if by_hand:
                scaler.unscale_(optimizer)
                training.mask_gradients()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert training.step == STEPS and not overflows
    assert same_masks(training, expected) and same(model, plain)


@pytest.mark.parametrize("way", ["closure", "named closure", "compiled"])
def test_closures_and_compiled_models_train_under_the_same_masks(way):
    plain, optimizer, expected = attached()
    train(plain, optimizer, stream())
    model = network()
    called = torch.compile(model, backend="eager") if way == "compiled" else model
    _, optimizer, training = attached(called)
    for x, y in stream():

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(called(x), y)
            loss.backward()
            return loss

        if way == "compiled":
            train(called, optimizer, [(x, y)])
        else:
            assert (optimizer.step(closure) if way == "closure" else optimizer.step(closure=closure)) > 0
    assert same(model, plain) and same_masks(training, expected)


def test_after_accelerate_prepared_an_optimiser_it_acts_on_whole_batches():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), **MOMENTUM))
    training = SparseTraining(model, optimizer, 0.3, total_steps=STEPS, update_every=4)
    before = copy.deepcopy(training.masks)
    for x, y in stream():
        for part in (slice(0, 8), slice(8, 16)):
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x[part]), y[part]))
                optimizer.step()
                optimizer.zero_grad()
    assert training.step == STEPS and not all(mask.equal(training.masks[name]) for name, mask in before.items())
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in training.masks.items())
    with pytest.raises(UserError, match="has a SparseTraining already"):
        SparseTraining(model, optimizer, 0.3, total_steps=STEPS, update_every=4)


def test_it_ends_with_zeros_and_leaves_the_optimiser():
    model, optimizer, training = attached(distribution="snip", batch=batch())
    train(model, optimizer, stream()[:10])
    layer = model.get_parameter(next(iter(training.masks)))
    layer.data.add_(1)  # an update from elsewhere
    training.finalize()
    training.finalize()
    assert torch.equal(layer != 0, next(iter(training.masks.values())))
    small = training.compressed()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expanded(small).items())
    assert any(name.endswith(".columns") for name in small)
    train(model, optimizer, stream()[:2])
    assert training.step == 10 and not torch.equal(layer != 0, next(iter(training.masks.values())))  # dense training
    SparseTraining(model, optimizer, 0.3, total_steps=STEPS, update_every=4)  # another may follow


def test_what_does_not_fit_is_refused_and_changes_nothing():
    trained, optimizer, _ = attached()
    before = copy.deepcopy(trained)
    other = network()
    shared = nn.Sequential(nn.Linear(D, D), *trained.features)
    sharded = nn.Linear(D, C)
    sharded.weight = nn.Parameter(sharded.weight.data.as_subclass(type("Sharded", (torch.Tensor,), {})))
    alien = torch.optim.SGD(network().parameters(), 0.1)
    frozen = nn.Sequential(nn.BatchNorm1d(D))
    for model, chosen, options, message in (
        (trained, optimizer, {}, "has a SparseTraining already"),
        (trained, None, {}, "has a SparseTraining already"),
        (shared, None, {}, "or a layer of the model has a SparseTraining"),
        (sharded, None, {}, "weight is a Sharded: SparseTraining needs whole"),
        (other, alien, {}, r"the optimiser does not have \S+ of the model"),
        (frozen, None, {}, "the model trains 0 weights of 0 linear and convolutional layers"),
        (other, None, {"density": 1e-3}, "trains 344 weights of 3 .* layers, 0 would exist: at least one each"),
        (other, None, {"growth": "gradien"}, "did you mean 'gradient'"),
        (other, None, {"total_steps": 4}, "update_every = 4 is"),
        (other, None, {"distribution": "dense"}, "would stay dense"),
        (other, None, {"distribution": "snip"}, r"'snip' scores weights on a batch: give batch=\(x, y\)"),
    ):
        chosen = chosen or torch.optim.SGD(model.parameters(), 0.1)
        with pytest.raises(UserError, match=message) as raised:
            SparseTraining(model, chosen, **{"total_steps": STEPS, "update_every": 4, **options})
        assert "\n" not in str(raised.value)
    assert same(before, trained) and same(other, network())


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_a_gradient_that_is_not_finite_is_refused_before_anything_changes(growth):
    model, optimizer, training = attached(growth=growth)
    train(model, optimizer, stream()[:4])
    before, masks = copy.deepcopy(model), copy.deepcopy(training.masks)
    x, y = stream()[4]
    with pytest.raises(UserError, match=r"step 4: the gradient of \S+ is not finite: lower the learning rate"):
        train(model, optimizer, [(x * torch.nan, y)])
    assert same(before, model) and all(mask.equal(masks[name]) for name, mask in training.masks.items())
    assert training.step == 4
    optimizer.zero_grad()
    twin, other, _ = attached(growth=growth)
    train(model, optimizer, stream()[4:])  # the loop may go on with other samples
    train(twin, other, stream())
    assert same(model, twin)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_whose_hooks_would_be_lost_is_refused(copied):
    with pytest.raises(UserError, match="cannot be copied or pickled"):
        copied(attached()[2])


def test_steps_beyond_the_training_keep_the_masks():
    model, optimizer, training = attached()
    train(model, optimizer, stream())
    masks = copy.deepcopy(training.masks)
    train(model, optimizer, stream()[:10])
    assert training.step == STEPS + 10
    assert all(training.masks[name].equal(m) and not model.get_parameter(name)[~m].any() for name, m in masks.items())


def test_an_optimiser_that_moves_pruned_weights_is_refused():
    model, optimizer, _ = attached()
    optimizer.register_step_post_hook(lambda *_: [weight.data.add_(1e-3) for weight in model.parameters()])
    with pytest.raises(UserError, match="SGD mixes the updates of weights"):
        train(model, optimizer, stream()[:2])
    model, optimizer, training = attached()
    model.load_state_dict(network().state_dict())  # too late: dense weights
    with pytest.raises(UserError, match="set from elsewhere"):
        train(model, optimizer, stream()[:1])
    assert training.step == 0

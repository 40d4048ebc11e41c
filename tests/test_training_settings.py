"""A step by its settings: the optimiser, parts of a batch, clipping, smoothed labels, and which weights decay."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gloo import on_workers
from raypkg.core.settings import Training
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.loop import fit
from raypkg.engine.run import Hook, Run, build_optimizer

SAMPLES = 66  # in batches of 33: two workers have 17 and 16 of each, so as many parts are not of one size
PLAIN = {"epochs": 3, "batch_size": 33, "lr": 0.1, "precision": "float64"}


def split():
    x = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(0))
    return Split.from_tensors(x, torch.arange(SAMPLES) % 3)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def weighted():
    weights = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(2)) * 3
    return Coreset(torch.arange(SAMPLES), weights)


def trained(hooks=(), checkpoints=None, worker=None, **settings):
    run = Run.simple(network(), split(), Training(**PLAIN | settings), hooks=hooks, coreset=weighted(), worker=worker)
    return fit(run, checkpoints=checkpoints)


def weights_of(run):
    return torch.cat([w.detach().flatten() for w in run.model.parameters()])


class Noted(Hook):
    """Notes what it is shown at each step."""

    def __init__(self, scale=1.0):
        self.scale = scale
        self.seen = []
        self.norms = []

    def on_gradients(self, run):
        for parameter in run.model.parameters():
            parameter.grad.mul_(self.scale)
        self.norms.append(torch.cat([w.grad.flatten() for w in run.model.parameters()]).norm().item())

    def on_step(self, run):
        self.seen.append((run.batch, run.seen))


# Parts of a batch


@pytest.mark.parametrize("size", [1, 5, 32])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_batches_in_parts_train_as_whole_ones(size, optimizer):
    whole = trained(optimizer=optimizer)
    parts = trained(optimizer=optimizer, micro_batch=size)
    assert torch.allclose(weights_of(whole), weights_of(parts), rtol=0, atol=1e-12)
    assert not torch.equal(weights_of(whole), weights_of(parts))  # the sums had another order
    assert parts.bills()[0].backward == whole.bills()[0].backward == 3 * SAMPLES
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-12)
        assert one["train_accuracy"] == other["train_accuracy"]


@pytest.mark.parametrize("settings", [{"micro_batch": 33}, {"micro_batch": 1000}, {"clip": 1e6}])
def test_a_part_as_large_as_the_batch_and_gradients_below_the_limit_are_as_they_are_bit_by_bit(settings):
    plain = trained()
    assert torch.equal(weights_of(plain), weights_of(trained(**settings))) and "clipped" not in plain.rows[0]


def test_no_more_samples_than_asked_for_go_through_the_model_at_once():
    sizes = []
    model = network()
    model.register_forward_hook(lambda layer, inputs, output: sizes.append(len(output)))
    fit(Run.simple(model, split(), Training(**PLAIN | {"epochs": 1, "micro_batch": 10})))
    assert sizes == [9, 8, 8, 8] * 2


def test_hooks_see_the_whole_batch():
    whole, parts = Noted(), Noted()
    trained([whole])
    trained([parts], micro_batch=5)
    assert whole.norms == pytest.approx(parts.norms, abs=1e-12)
    for (batch, seen), (again, seen_again) in zip(whole.seen, parts.seen, strict=True):
        assert torch.equal(batch.indices, again.indices) and torch.equal(seen.indices, seen_again.indices)
        assert torch.allclose(seen.losses, seen_again.losses, rtol=0, atol=1e-12)
        assert torch.equal(seen.right, seen_again.right)


def trained_on(worker, settings):
    return weights_of(trained(worker=worker, **settings))


@pytest.mark.parametrize("settings", [{"micro_batch": 16}, {"micro_batch": 4, "clip": 0.2}])
def test_two_workers_with_batches_in_parts_end_where_one_without_does(settings):
    first, second = on_workers(2, trained_on, settings)
    assert torch.equal(first, second)
    alone = trained(**settings | {"micro_batch": None})
    assert torch.allclose(first, weights_of(alone), rtol=0, atol=1e-12)


# Clipping


@pytest.mark.parametrize(("limit", "smoothing"), [(None, 0.0), (0.3, 0.0), (None, 0.2), (0.3, 0.2)])
def test_a_step_on_weighted_clipped_and_smoothed_samples_is_the_one_written_out(limit, smoothing):
    """The objective is mean(w · loss) of smoothed labels; plain losses are recorded."""
    noted, chosen = Noted(), {"clip": limit, "label_smoothing": smoothing}
    run = trained([noted], epochs=1, batch_size=SAMPLES, momentum=0.0, weight_decay=0.0, **chosen)
    ((batch, seen),) = noted.seen
    start, share = network().double(), weighted().weights.double()[batch.indices]
    target = (1 - smoothing) * F.one_hot(batch.y, 3).double() + smoothing / 3
    logits = start(batch.x)
    objective = -(target * logits.log_softmax(1)).sum(1) @ share / SAMPLES
    gradients = torch.autograd.grad(objective, list(start.parameters()), retain_graph=True)
    gradient = torch.cat([each.flatten() for each in gradients])
    if limit:
        assert run.norm.item() == pytest.approx(gradient.norm().item(), rel=1e-6) and gradient.norm() > limit
        gradient *= limit / gradient.norm()
    expected = torch.cat([w.detach().flatten() for w in start.parameters()]) - 0.1 * gradient
    assert torch.allclose(weights_of(run), expected, rtol=0, atol=1e-6 if limit else 1e-12)
    plain = F.cross_entropy(logits, batch.y, reduction="none")
    assert torch.allclose(seen.losses, plain, rtol=0, atol=1e-12)
    assert run.rows[0]["loss"] == pytest.approx((plain @ share / SAMPLES).item(), abs=1e-12)


def test_gradients_are_clipped_after_hooks_have_edited_them():
    raw, enlarged = Noted(), Noted(scale=100.0)
    first = trained([raw], clip=1e-3)
    second = trained([enlarged], clip=1e-3)
    assert enlarged.norms[0] == pytest.approx(100 * raw.norms[0])
    assert torch.allclose(weights_of(first), weights_of(second), rtol=0, atol=1e-6)


def test_an_epoch_tells_the_norm_before_clipping_and_how_often_it_was_too_large():
    noted = Noted()
    trained([noted])
    limit = sorted(noted.norms)[1] * 1.0001  # of the first steps, which clipping does not yet change
    watched = Noted()
    run = trained([watched], clip=limit)
    for epoch, row in enumerate(run.rows):
        norms = watched.norms[2 * epoch : 2 * epoch + 2]
        assert row["gradient_norm"] == pytest.approx(sum(norms) / 2)
        assert row["clipped"] == sum(norm > limit for norm in norms) / 2
    assert 0 < sum(row["clipped"] for row in run.rows) < 3


# Which weights decay


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_matrices_alone_decay(optimizer):
    frozen = {"epochs": 1, "batch_size": SAMPLES, "weight_decay": 0.5, "momentum": 0.0, "optimizer": optimizer}
    still = Noted(scale=0.0)  # no gradient: what moves has decayed
    start = {name: w.detach().clone().double() for name, w in network().named_parameters()}
    for decay in ("matrices", "all"):
        for name, w in trained([still], decay=decay, **frozen).model.named_parameters():
            factor = 0.95 if w.dim() > 1 or decay == "all" else 1.0
            assert torch.allclose(w, factor * start[name], rtol=0, atol=1e-12), name


# The optimiser is PyTorch's own to the last bit


PYTORCHS = {
    "sgd": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True),
    "adamw": lambda weights: torch.optim.AdamW(weights, 0.1, betas=(0.9, 0.999), weight_decay=5e-4, fused=True),
}


def take_steps(model, chosen, count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(8, 6, generator=generator)
        model(x).square().sum().backward()
        chosen.step()
        chosen.zero_grad()


@pytest.mark.parametrize("name", PYTORCHS)
def test_trains_as_pytorchs_own_bit_by_bit_also_from_its_state(name):
    ours, theirs = network(), network()
    mine = build_optimizer(ours, Training(optimizer=name))
    reference = PYTORCHS[name](theirs.parameters())
    assert isinstance(mine, type(reference))
    take_steps(ours, mine, 3)
    take_steps(theirs, reference, 3)
    again = build_optimizer(ours, Training(optimizer=name))
    again.load_state_dict(mine.state_dict())
    take_steps(ours, again, 3)
    take_steps(theirs, reference, 3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)

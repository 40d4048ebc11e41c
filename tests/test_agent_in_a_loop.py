"""GradientCorrection in a loop of one's own, alone, with SparseTraining and with CoresetLoader."""

import copy
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from gloo import on_workers
from raypkg import CoresetLoader, GradientCorrection, SparseTraining
from raypkg.core.errors import UserError
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import Batches
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.engine.worker import Worker
from raypkg.methods.agent.correction import weighted_loss
from raypkg.methods.agent.hook import Correction
from raypkg.methods.agent.settings import AgentOptions
from raypkg.methods.sparse.masks import drop_fraction, dropped, grown
from sparse_training import PLAIN, STEPS, N, batch, network, run, sparse, split

EPOCHS = 5
EVERYTHING = Coreset.uniform(torch.arange(N))


def stream(epoch, coreset=EVERYTHING, size=16):
    """Return x, y, w of every batch of an epoch of effray's own run."""
    batches = Batches(split(), coreset, size, seed=0, augment=(), worker=Worker())
    return [(part.x, part.y, part.weights) for part in batches.epoch(epoch)]


def optimizer_of(model, fused=True):
    rates = {"momentum": PLAIN.momentum, "nesterov": PLAIN.nesterov}
    return torch.optim.SGD(model.parameters(), PLAIN.lr, **rates, fused=fused)


def sparse_training(model, optimizer, total_steps=STEPS, **options):
    return SparseTraining(model, optimizer, 0.3, total_steps=total_steps, update_every=4, **options)


def by_hand(form="published", *, masked=False, coreset=EVERYTHING, parts=1, clip=None, **options):
    """Train as a user would, on the batches of effray's own run; return the model and the two objects."""
    model = network()
    optimizer = optimizer_of(model)
    steps = EPOCHS * len(stream(0, coreset))
    training = sparse_training(model, optimizer, steps) if masked else None
    agent = GradientCorrection(model, form, **options)
    for epoch in range(EPOCHS):
        batches = stream(epoch, coreset)
        agent.snapshot(batches, samples=len(coreset))
        for step in batches:
            whole = len(step[1])
            pieces = list(zip(*(tensor.chunk(parts) for tensor in step), strict=True))

            def closure(model, pieces=pieces, whole=whole):
                return (weighted_loss(model, piece) * (len(piece[1]) / whole) for piece in pieces)

            for loss in closure(model):
                loss.backward()
            agent.correct(closure)
            if clip:
                training.mask_gradients()
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        agent.estimate(batches)
    return model, agent, training


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


STRONG = {"gamma": 0.5, "alpha": 0.6}
FORMS = [("published", {}), ("published", STRONG), ("measured", {}), ("linear", {"epochs": EPOCHS})]


@pytest.mark.parametrize(("form", "options"), FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_effrays_own_run_bit_for_bit(form, options, masked):
    model, agent, training = by_hand(form, masked=masked, **options)
    given = {name: value for name, value in options.items() if name != "epochs"}
    hook = Correction(AgentOptions(form=form, always=form == "measured", **given))
    hooks = sparse(correction=[hook]) if masked else [hook]
    theirs = fit(run(*hooks)).model
    plain = fit(run(*(sparse() if masked else ()))).model
    assert same(model, theirs) and not same(model, plain)
    assert agent.c == float(hook.agent.weight.c) != 0 and agent.variance_left == hook.agent.variance_left
    if masked:
        assert all(mask.equal(hooks[0].masks[name]) for name, mask in training.masks.items())


def test_on_a_coreset_both_equal_effrays_own_run_bit_for_bit():
    x, y, _ = zip(*stream(0, size=N), strict=True)
    loader = CoresetLoader(DataLoader(TensorDataset(x[0], y[0]), batch_size=16), network(), "craig", 0.5, epochs=1)
    list(loader)
    chosen = loader.coreset
    model, _, training = by_hand(masked=True, coreset=chosen, clip=1.0)
    hooks = sparse(correction=[Correction(AgentOptions())])
    hooks[0].steps = training.total_steps
    theirs = fit(Run.simple(network(), split(), PLAIN.model_copy(update={"clip": 1.0}), hooks=hooks, coreset=chosen))
    assert same(model, theirs.model) and chosen.weights.std() > 0


def test_micro_batches_add_up():
    model = by_hand("measured", masked=True, parts=2)[0]
    hooks = sparse(correction=[Correction(AgentOptions(form="measured", always=True))])
    theirs = fit(run(*hooks, micro_batch=8)).model
    torch.testing.assert_close([*model.parameters()], [*theirs.parameters()], rtol=1e-5, atol=1e-6)


def loader_of(model):
    data = DataLoader(TensorDataset(*batch(N)), batch_size=8)
    return CoresetLoader(data, model, "gradmatch", 0.5, epochs=EPOCHS, every_epochs=2)


class Loop:
    """All three objects in one loop, which stops at a step, and resumes at one."""

    def __init__(self):
        self.model = network()
        self.optimizer = optimizer_of(self.model)
        self.training = sparse_training(self.model, self.optimizer)
        self.agent = GradientCorrection(self.model, gamma=1.0, alpha=0.5)
        self.loader = loader_of(self.model)
        self.batches, self.position, self.expected = [], 0, {}

    def train(self, last):
        while self.training.step < last:
            if self.position == len(self.batches):
                self.batches, self.position = list(self.loader), 0
                self.agent.snapshot(self.batches)
            step = self.batches[self.position]
            self.position += 1
            weighted_loss(self.model, step).backward()
            raw = {name: weight.grad.clone() for name, weight in self.training.weights.items()}
            self.agent.correct(lambda model, step=step: weighted_loss(model, step))
            if self.training.due(self.training.step):
                corrected = {name: weight.grad for name, weight in self.training.weights.items()}
                self.expected = {"raw": self.change(raw), "corrected": self.change(corrected)}
            self.optimizer.step()
            self.optimizer.zero_grad()

    def change(self, gradients):
        masks = {}
        for name, mask in self.training.masks.items():
            weight = self.training.weights[name].data
            count = int(drop_fraction(0.5, self.training.step / STEPS) * int(mask.sum()) + 1e-9)
            masks[name] = grown(dropped(mask, weight[mask].abs(), count), gradients[name].abs(), count)
        return masks

    def parts(self):
        return self.model, self.optimizer, self.training, self.agent, self.loader


def test_weights_grow_on_the_raw_gradient():
    loop, found = Loop(), []
    for last in range(5, STEPS, 4):
        loop.train(last)
        masks = loop.training.masks
        found.append([all(map(torch.equal, loop.expected[kind].values(), masks.values())) for kind in loop.expected])
    on_raw, on_corrected = zip(*found, strict=True)
    assert all(on_raw) and not all(on_corrected)
    assert loop.agent.c  # negative here: the covariance of six losses may be
    assert not any(hasattr(weight, "raw_grad") for weight in loop.training.weights.values())


@pytest.mark.parametrize("stop", [6, 8, 15])
def test_stopped_within_an_epoch_and_resumed_equals_never_stopped(stop):
    straight = Loop()
    straight.train(STEPS)
    first = Loop()
    first.train(stop)
    kept = io.BytesIO()
    torch.save([each.state_dict() for each in first.parts()], kept)
    kept.seek(0)
    again = Loop()
    for each, state in zip(again.parts(), torch.load(kept), strict=True):
        each.load_state_dict(state)
    again.batches, again.position = first.batches, first.position
    again.train(STEPS)
    assert same(straight.model, again.model) and straight.agent.c == again.agent.c


@pytest.mark.parametrize("form", ["published", "measured"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_grad_scaler_skips_steps_without_a_trace(fused, form):
    found = []
    for overflows in ({}, {4: 1, 9: 2, 16: 1}):  # attempts of a step that overflow
        model = network()
        optimizer = optimizer_of(model, fused)
        training = sparse_training(model, optimizer)
        agent = GradientCorrection(model, form, skips_overflows=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for epoch in range(EPOCHS):
            batches = stream(epoch)
            agent.snapshot(batches)
            for step in batches:
                for attempt in reversed(range(1 + overflows.get(training.step, 0))):
                    scaler.scale(weighted_loss(model, step)).backward()
                    if attempt:
                        model.head.weight.grad[0] = torch.inf
                    scaler.unscale_(optimizer)
                    agent.correct(partial(weighted_loss, batch=step))
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
        assert training.step == STEPS
        found.append(model)
    assert same(*found)


def test_a_compiled_model_with_batch_norm_keeps_its_statistics():
    corrected = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    corrected[1].eval()  # frozen: the snapshot must not use the statistics of its batch either
    plain = copy.deepcopy(corrected)
    agent = GradientCorrection(torch.compile(corrected, backend="eager"), "measured")
    agent.snapshot(stream(0))
    before = {name: buffer.clone() for name, buffer in corrected.named_buffers()}
    step = stream(0)[0]
    mean = sum(weighted_loss(plain, each) for each in stream(0)) / len(stream(0))
    full = torch.autograd.grad(mean, list(plain.parameters()))
    weighted_loss(corrected, step).backward()
    agent.correct(partial(weighted_loss, batch=step))
    torch.testing.assert_close([p.grad for p in corrected.parameters()], [*full])  # at the snapshot γc = 1 leaves g̃
    agent.estimate(stream(0))
    assert all(buffer.equal(before[name]) for name, buffer in corrected.named_buffers())


def trained_on(worker, form):
    model = network().double()
    wrapped = DistributedDataParallel(model) if worker.world > 1 else model
    optimizer = optimizer_of(model)
    training = sparse_training(wrapped, optimizer)
    agent = GradientCorrection(wrapped, form, gamma=0.5)
    share = slice(worker.rank * 16 // worker.world, (worker.rank + 1) * 16 // worker.world)
    for epoch in range(EPOCHS):
        batches = [(x[share].double(), y[share], w[share].double()) for x, y, w in stream(epoch)]
        agent.snapshot(batches)
        for step in batches:
            weighted_loss(wrapped, step).backward()
            agent.correct(partial(weighted_loss, batch=step))
            optimizer.step()
            optimizer.zero_grad()
    masks = {name: mask.tolist() for name, mask in training.masks.items()}
    return masks, agent.c, [parameter.tolist() for parameter in model.parameters()]


@pytest.mark.parametrize("form", ["published", "measured"])
def test_two_ranks_train_as_one(form):
    masks, c, weights = trained_on(Worker(), form)
    for other_masks, other_c, others in on_workers(2, trained_on, form):
        assert other_masks == masks and other_c == pytest.approx(c, rel=1e-8)
        for mine, expected in zip(others, weights, strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(expected), rtol=0, atol=1e-9)


def after(*snapshots, **options):
    """Return a correction after snapshots over batches."""
    agent = GradientCorrection(network(), **options)
    for batches in snapshots:
        agent.snapshot(batches)
    return agent


STEP = stream(0)[0]
PLAIN_LOSS = partial(weighted_loss, batch=STEP)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: after(form="publishd"), "form"),
        (lambda: after(gamma=2.0), "gamma = 2.0"),
        (lambda: after(alpha=0.0), "alpha = 0 with form = published would correct nothing"),
        (lambda: after(form="linear"), "epochs = None with form = linear"),
        (lambda: after(epochs=3), "epochs = 3 with form = published"),
        (lambda: GradientCorrection(network().requires_grad_(False)), "all parameters of the model are frozen"),
        (lambda: after().correct(PLAIN_LOSS), r"no snapshot yet: call snapshot\(batches\)"),
        (lambda: after(iter(stream(0))), "can be passed once only"),
        (lambda: after([], form="measured"), "there are no batches"),
        (lambda: after([STEP], [STEP]), "estimate: 1 batches: c is a covariance over at least 2"),
        (lambda: after(stream(0), stream(1), form="linear", epochs=1), "snapshot 2 of epochs = 1"),
        (
            lambda: after().load_state_dict(GradientCorrection(nn.Linear(2, 2)).state_dict()),
            "is of another model",
        ),
        (lambda: after(form="measured").load_state_dict(after().state_dict()), "form = published, not measured"),
        (lambda: after().load_state_dict({}), "no 'copy'"),
    ],
)
def test_what_does_not_fit_is_refused(act, message):
    with pytest.raises(UserError, match=message) as raised:
        act()
    assert "\n" not in str(raised.value)


def test_gradients_that_are_not_finite_are_refused_before_anything_changes():
    models = []
    for fails in (True, False):
        agent = after(stream(0), form="measured")
        model, optimizer = agent.model, optimizer_of(agent.model)
        for number, step in enumerate(stream(0)):
            if fails and number == 3:
                (F.cross_entropy(model(step[0]), step[1]) * torch.nan).backward()
                with pytest.raises(UserError, match="correction 3: a gradient is not finite: lower the learning rate"):
                    agent.correct(partial(weighted_loss, batch=step))
                optimizer.zero_grad()
            weighted_loss(model, step).backward()
            agent.correct(partial(weighted_loss, batch=step))
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert same(*models)
    model.head.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="snapshot 1: the full gradient is not finite"):
        agent.snapshot(stream(1))


@pytest.mark.parametrize("form", ["measured", "published"])  # c = 1 and c = 0
def test_what_is_no_loss_of_the_snapshot_is_refused_and_changes_no_gradient(form):
    agent = after(stream(0), form=form)
    PLAIN_LOSS(agent.model).backward()
    before = [weight.grad.clone() for weight in agent.model.parameters()]
    mistakes = [(lambda _: PLAIN_LOSS(agent.model), "does not depend on the snapshot")]
    if form == "measured":
        mistakes.append((lambda snapshot: PLAIN_LOSS(snapshot) * torch.nan, "loss is not finite"))
    for mistake, message in mistakes:
        with pytest.raises(UserError, match=message):
            agent.correct(mistake)
    assert agent.step == 0 and all(map(torch.equal, before, (weight.grad for weight in agent.model.parameters())))

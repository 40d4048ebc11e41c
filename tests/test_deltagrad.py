"""DeltaGrad against dense algebra and against training again."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import reference
from raypkg.core.errors import UserError
from raypkg.core.settings import Model
from raypkg.data import Data
from raypkg.data.split import Split, aligned
from raypkg.engine.shards import Shard, WorkerShards
from raypkg.methods.deltagrad.answer import ShardedGradient
from raypkg.methods.deltagrad.history import DIGESTS, RECORDS, History, HistoryWriter, Layout, check_room
from raypkg.methods.deltagrad.journal import Journal
from raypkg.methods.deltagrad.linearised import Linearised
from raypkg.methods.deltagrad.objective import Objective, check_derivation, to_vector
from raypkg.methods.deltagrad.replay import BFGS, ChangedStep, Periodic, replay, retrain
from raypkg.methods.deltagrad.run import Membership, settings_digest
from raypkg.methods.deltagrad.settings import DeltaGradSettings, ReplaySettings, RequestSettings
from raypkg.models import build_model
from raypkg.runs.folder import LOG
from raypkg.runs.storage import Storage

N, D, C, DECAY = 90, 5, 3, 0.01
EVERYONE = torch.ones(N, dtype=torch.bool)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(n=N, seed=0):
    y = torch.arange(n) % C
    return Split.from_tensors(torch.randn(n, D, generator=generator(seed)) + y[:, None], y)


SPLIT = rows()
LINEAR = Objective.of(Model(name="linear"), SPLIT)
MLP = Objective.of(Model(name="mlp", options={"hidden": [6]}), SPLIT)


class Training:
    """A training small enough to repeat: who is in use, and what that gives."""

    def __init__(self, objective=LINEAR, batch_size=30, epochs=6, split=SPLIT, added=()):
        self.objective, self.epochs, self.split = objective, epochs, split
        self.membership = Membership(torch.arange(N), added, batch_size, 0)
        name, options = (json.loads(objective.model)[part] for part in ("name", "options"))
        self.initial = to_vector(build_model(name, (D,), C, seed=0, options=options).parameters()).double()

    def gradient(self, w, indices):
        return self.objective.gradient_sum(self.split, w, indices)

    def batches(self):
        for epoch in range(self.epochs):
            for place, batch in enumerate(self.membership.epoch(epoch)):
                yield 0.5 / (1 + epoch + 0.1 * place), batch

    def retrained(self, active):
        steps = ((rate, batch[active[batch]]) for rate, batch in self.batches())
        return list(retrain(steps, self.initial, self.gradient, decay=DECAY))

    def record(self, active):
        path = [self.initial, *self.retrained(active)]
        for (rate, batch), w, after in zip(self.batches(), path, path[1:], strict=False):
            used = batch[active[batch]]
            yield rate, w, self.gradient(w, used) / max(1, len(used)), after, batch

    def replayed(self, before, now, exact_steps=None, **options):
        steps = (
            ChangedStep(rate, w, g, after, b[before[b] & now[b]], b[before[b] & ~now[b]], b[now[b] & ~before[b]])
            for rate, w, g, after, b in self.record(before)
        )
        return list(replay(steps, self.gradient, exact_steps or Periodic(1, 1), decay=DECAY, **options))


def without(*ids):
    return EVERYONE.index_fill(0, torch.tensor(ids), False)


@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_product_is_that_of_the_dense_bfgs_matrix(pairs):
    rng, curvature = generator(pairs), BFGS(pairs)
    ones = torch.ones(7, dtype=torch.float64)
    assert not curvature.push(ones, -ones) and not curvature.push(0 * ones, ones) and not curvature  # without curvature
    root = torch.randn(7, 7, generator=rng, dtype=torch.float64)
    hessian, kept = root @ root.T + torch.eye(7), []
    for _ in range(5):
        s = torch.randn(7, generator=rng, dtype=torch.float64)
        assert curvature.push(s, hessian @ s)
        kept = [*kept, (s, hessian @ s)][-pairs:]
        v = torch.randn(7, generator=rng, dtype=torch.float64)
        torch.testing.assert_close(curvature.product(v), reference.bfgs(kept) @ v, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(curvature.product(s), hessian @ s, rtol=1e-10, atol=1e-10)  # the secant equation


@pytest.mark.parametrize("stored", ["pixels", "rows"])
def test_closed_form_is_what_autograd_computes(stored):
    rng = generator()
    x = torch.randint(0, 256, (40, 2, 3, 3), generator=rng, dtype=torch.uint8)
    split = Split.from_tensors(x, torch.arange(40) % C) if stored == "pixels" else rows(40)
    objective = Objective.of(Model(name="linear"), split)
    size = C * (int(np.prod(split.shape)) + 1)
    w, indices = torch.randn(size, generator=rng, dtype=torch.float64), torch.arange(3, 33)
    expected = reference.gradient_sum(build_model("linear", split.shape, C, seed=0), split, w, indices)
    torch.testing.assert_close(objective.gradient_sum(split, w, indices), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", [LINEAR, MLP], ids=["linear", "mlp"])
@pytest.mark.parametrize("batch_size", [N, 30, 7], ids=["gd", "sgd", "small batches"])
@pytest.mark.parametrize("adding", [False, True], ids=["delete", "add"])
def test_every_step_exact_equals_training_again(objective, batch_size, adding):
    training, some = Training(objective, batch_size), without(1, 2, 40, 41, 80)
    before, now = (some, EVERYONE) if adding else (EVERYONE, some)
    got, expected = training.replayed(before, now, convex=objective.linear)[-1].after, training.retrained(now)[-1]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_a_batch_of_deleted_samples_only_is_skipped():
    training = Training(batch_size=3, epochs=2)
    some = EVERYONE.index_fill(0, training.membership.epoch(0)[1], False)
    steps = training.replayed(EVERYONE, some)
    assert torch.equal(steps[1].after, steps[1].w)  # not even decayed
    torch.testing.assert_close(steps[-1].after, training.retrained(some)[-1], rtol=0, atol=1e-12)
    back = training.replayed(some, EVERYONE)
    torch.testing.assert_close(back[-1].after, training.retrained(EVERYONE)[-1], rtol=0, atol=1e-12)


def test_small_batches_do_not_blow_up_and_without_changes_the_record_is_passed_through_bit_for_bit():
    training, some = Training(batch_size=5, epochs=40), without(*range(0, 30, 3))
    old, new = training.retrained(EVERYONE)[-1], training.retrained(some)[-1]
    steps = training.replayed(EVERYONE, some, Periodic(5, 10))
    assert (steps[-1].after - new).norm() < (old - new).norm() and not all(step.exact for step in steps)
    steps = training.replayed(EVERYONE, EVERYONE, Periodic(5, 2))
    assert torch.equal(steps[-1].after, old) and not any(step.exact for step in steps)


def test_a_burn_in_ends_once_predictions_are_right():
    training, some = Training(batch_size=N, epochs=20), without(1, 2, 40)
    old, new = training.retrained(EVERYONE)[-1], training.retrained(some)[-1]
    exact = {}
    for settled in (None, 0.5, 1e-9):
        steps = training.replayed(EVERYONE, some, Periodic(5, 12, settled))
        exact[settled] = sum(step.exact for step in steps)
        assert (steps[-1].after - new).norm() < 0.1 * (old - new).norm()
    assert exact[0.5] < exact[None] == exact[1e-9]


@pytest.mark.parametrize("batch_size", [N, 30])
def test_linearised_training_is_the_recursion_with_a_dense_hessian(batch_size, monkeypatch):
    monkeypatch.setattr("raypkg.methods.deltagrad.linearised.SEGMENTS", 1000)
    training, gone = Training(batch_size=batch_size), torch.tensor([1, 2, 40])
    record = [(rate, w, g) for rate, w, g, _, _ in training.record(EVERYONE)]
    middle = record[len(record) // 2][1]
    hessian = torch.stack([training.gradient(w, torch.arange(N)) for w in middle + 1e-6 * torch.eye(len(middle))])
    hessian = (hessian - training.gradient(middle, torch.arange(N))) / (1e-6 * N) + DECAY * torch.eye(len(middle))
    v = torch.zeros_like(middle)
    for rate, w, g in record:
        v = v - rate * (hessian @ v - (training.gradient(w, gone) - 3 * g) / (N - 3))
    got = Linearised(LINEAR, SPLIT, record, torch.arange(N), DECAY).change(gone)
    torch.testing.assert_close(got, v, rtol=1e-4, atol=1e-7)
    old, new = training.retrained(EVERYONE)[-1], training.retrained(EVERYONE.index_fill(0, gone, False))[-1]
    assert (old + got - new).norm() < (0.1 if batch_size == N else 0.5) * (old - new).norm()


@pytest.mark.parametrize("holders", [1, 2, 3])
def test_shards_give_the_same_sum(holders):
    shards = [Shard(Data(SPLIT, SPLIT), part, part[:0]) for part in torch.arange(N).tensor_split(holders)]
    w, indices = torch.randn(C * (D + 1), generator=generator(), dtype=torch.float64), torch.randperm(N)[:70]
    sharded = ShardedGradient(LINEAR, SPLIT, WorkerShards(shards), few=10)
    torch.testing.assert_close(sharded(w, indices), LINEAR.gradient_sum(SPLIT, w, indices), rtol=0, atol=1e-12)
    assert sharded.samples == 70


def test_added_samples_have_one_place_an_epoch_and_keep_it():
    group = torch.arange(N, N + 10)
    membership = Membership(torch.arange(N), (group,), 30, 0)
    for epoch in range(3):
        places = membership.epoch(epoch)
        assert torch.cat(places).sort().values.tolist() == list(range(N + 10))
        assert all(torch.equal(a, b) for a, b in zip(places, membership.epoch(epoch), strict=True))
        old = Membership(torch.arange(N), (), 30, 0).epoch(epoch)
        assert all(torch.equal(batch[batch < N], before) for batch, before in zip(places, old, strict=True))


AB, BA = (replace(SPLIT, columns=columns) for columns in (("a", "b"), ("b", "a")))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: check_derivation(nn.Linear(2, 2).requires_grad_(False), "x"), "model 'x' does not train its 'weight'"),
        (lambda: check_derivation(nn.BatchNorm2d(3), "x"), "model 'x' has BatchNorm2d"),
        (lambda: check_derivation(nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), "x"), "model 'x' has Dropout"),
        (lambda: aligned(BA, AB, "new"), "new: columns b, a, those of training are a, b"),
        (lambda: DeltaGradSettings(train={"optimizer": "adamw"}), r"train\.optimizer = adamw"),
        (lambda: DeltaGradSettings(train={"momentum": 0.9}), r"train\.momentum = 0\.9"),
    ],
)
def test_what_is_outside_the_derivation_is_refused(act, message):
    with pytest.raises(UserError, match=message):
        act()


# The history


def recorded(folder, steps=5, dtype="float64", size=6, known=()):
    layout = Layout(size, dtype)
    writer = HistoryWriter(folder, layout)
    writer.start(known)
    path = torch.randn(steps + 1, size, dtype=torch.float64, generator=generator())
    for step in range(len(known), steps):
        writer.append(0.1 * step, path[step], -path[step])
    return layout, path, writer


def test_an_interrupted_history_continues_after_the_checkpoint(tmp_path):
    _, path, writer = recorded(tmp_path / "whole")
    whole = writer.seal(path[-1])
    _, _, writer = recorded(tmp_path / "cut")
    writer.flush()
    writer.close()
    with (tmp_path / "cut" / RECORDS).open("ab") as file:
        file.write(b"half a record" * 1000)  # more than the records to come overwrite
    _, _, again = recorded(tmp_path / "cut", known=writer.digests[:3])
    assert again.seal(path[-1]) == whole
    assert (tmp_path / "cut" / RECORDS).read_bytes() == (tmp_path / "whole" / RECORDS).read_bytes()


@pytest.mark.parametrize("file", [RECORDS, DIGESTS])
def test_any_flipped_byte_is_found_and_named(tmp_path, file):
    layout, path, writer = recorded(tmp_path)
    digest, content = writer.seal(path[-1]), (tmp_path / file).read_bytes()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1
        (tmp_path / file).write_bytes(damaged)
        with pytest.raises(UserError, match=r"corrupt") as error:
            history = History(tmp_path, layout, digest)
            history.check()
        step = (position - layout.start(0)) // layout.record_bytes
        if file == RECORDS and position >= layout.start(0):
            assert f"step {step} of" in str(error.value)


def test_a_history_that_does_not_fit_its_model_or_the_disk_is_refused(tmp_path):
    layout, path, writer = recorded(tmp_path)
    digest = writer.seal(path[-1])
    with pytest.raises(UserError, match="is corrupt, or of another model: it has not the size and head"):
        History(tmp_path, Layout(9, "float64"), digest)
    with pytest.raises(UserError, match="cannot be read"):
        History(tmp_path / "nowhere", layout, digest)
    with pytest.raises(UserError, match=r"the history takes \d+ TB \(1,000,000 steps × 11,000,000 parameters × 2 × 8"):
        check_room(tmp_path / "run", Layout(11_000_000, "float64"), 1_000_000)


# The log


def test_any_change_of_the_log_is_found(tmp_path):
    storage = Storage(str(tmp_path))
    journal = Journal(storage)
    for number in range(3):
        journal.append({"kind": "change", "what": number})
    assert [entry["what"] for entry in Journal(storage).entries] == [0, 1, 2]
    content = (tmp_path / LOG).read_bytes()
    for position in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[position] ^= 1
        (tmp_path / LOG).write_bytes(damaged)
        with pytest.raises(UserError, match=r"entry \d of .* is corrupt, or does not follow the one before"):
            Journal(storage)
    lines = content.splitlines(keepends=True)
    (tmp_path / LOG).write_bytes(lines[0] + lines[2])
    with pytest.raises(UserError, match=r"entry 1 of .* does not follow the one before"):
        Journal(storage)


# The settings


@pytest.mark.parametrize(
    ("given", "steps", "beginning"),
    [({}, 60, (20, None)), ({}, 59, (19, 0.1)), ({}, 2, (1, 0.1)), ({"burn_in": 7}, 20, (7, None)),
     ({"settled": 0.3}, 20, (6, 0.3)), ({"settled": 0.3}, 80, (20, 0.3))],
)  # fmt: skip
def test_few_steps_have_a_shorter_burn_in_that_ends_by_its_estimate(given, steps, beginning):
    assert ReplaySettings(**given).beginning(steps) == beginning


def test_the_settings_of_a_run_are_the_defaults_of_a_request():
    recorded = ReplaySettings(period=3, burn_in=7, pairs=4)
    assert RequestSettings.over(recorded, {}).replay == recorded
    assert RequestSettings.over(recorded, {"replay.period": "2"}).replay == ReplaySettings(period=2, burn_in=7, pairs=4)
    cut = ReplaySettings(burn_in=6, settled=0.1)
    assert RequestSettings.over(cut, {"replay.period": "2"}).replay == ReplaySettings(period=2, burn_in=6, settled=0.1)
    assert RequestSettings.over(cut, {"replay.burn_in": "2"}).replay == ReplaySettings(burn_in=2)
    assert RequestSettings.over(recorded, {}).cluster.workers == 0


def test_the_digest_covers_only_settings_that_affect_the_recorded_steps():
    unlike, *alike = (
        settings_digest(DeltaGradSettings(train=train))
        for train in ({"weight_decay": 0.1}, {"from": "one"}, {"micro_batch": 3}, {})
    )
    assert len(set(alike)) == 1 and unlike not in alike

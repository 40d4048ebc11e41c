"""Selecting during training: when, by what, and the same after a stop."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import reference
from raypkg.core.errors import UserError
from raypkg.core.seeds import derive, generator
from raypkg.core.settings import Reselect, Training
from raypkg.coresets.budgets import select
from raypkg.coresets.gradients import HeadView, head_view
from raypkg.coresets.loader import CoresetLoader
from raypkg.coresets.record import Record, Recorder
from raypkg.coresets.rules import coreset
from raypkg.coresets.sharded import Reselection, check_schedule
from raypkg.data import Data
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.batches import plain_batches
from raypkg.engine.loop import fit
from raypkg.engine.run import Hook, Run, Seen
from raypkg.engine.shards import WorkerShards, class_shards
from raypkg.engine.worker import Cost, Worker
from raypkg.models import build_model
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage

N = 90
PLAIN = Training(epochs=6, batch_size=16, lr=0.05, precision="float32")


def split():
    p = reference.problem(N, 3, 5, dtype=torch.float32)
    return Split.from_tensors(p.features, torch.arange(N) % 3)


class Diary(Hook):
    """Keeps the coreset and the model of each epoch's first moment."""

    def __init__(self):
        self.coresets, self.models = [], []

    def on_epoch(self, run):
        self.coresets.append(run.coreset)
        self.models.append({name: value.clone() for name, value in run.model.state_dict().items()})


def run(first=None, training=PLAIN, **select_settings):
    data, indices, diary = split(), torch.arange(N), Diary()
    recorder, none = Recorder(data.y), torch.empty(0, dtype=torch.int64)
    shards = WorkerShards(class_shards(Data(data, data), data.y, indices, none, 1))
    chosen = Reselection(Reselect(**{"fraction": 0.2, **select_settings}), shards, recorder, indices, first)
    model = build_model("mlp", (5,), 3, seed=0)
    return Run.simple(model, data, training, hooks=[recorder, chosen, diary])


def coresets(trained):
    return [picked.indices.tolist() for picked in trained.hooks[-1].coresets]


def later(view: HeadView, budget: int, *, rng: torch.Generator, progress: float = 0.0) -> Coreset:
    """Pick samples that tell how much of the training's six epochs was done."""
    return Coreset.uniform(torch.arange(budget) + round(6 * progress))


@pytest.mark.parametrize("classes", [1, 3])
def test_a_rule_by_gradients_is_told_how_much_of_the_training_is_done(classes):
    """Class by class, and of all samples at once."""
    picks = coresets(fit(run(rule="test_reselection:later", every_epochs=2, balanced=classes > 1)))
    assert [picked[0] // classes for picked in picks] == [0, 0, 2, 2, 4, 4]


def test_random_is_drawn_once_or_at_every_epoch():
    fixed, online = coresets(fit(run(rule="random"))), coresets(fit(run(rule="random", every_epochs=1)))
    assert len({tuple(picked) for picked in fixed}) == 1
    assert len({tuple(picked) for picked in online}) == 6
    assert {len(picked) for picked in fixed + online} == {18}


@pytest.mark.parametrize(
    ("rule", "fraction", "every", "warm"),
    [
        ("random", 0.3, 1, 0),
        ("grand", 0.3, 2, 1),
        ("el2n", 0.2, 0, 2),
        ("kcenter", 0.3, 3, 0),
        ("infobatch", 1.0, 1, 0),
    ],
)
def test_a_bare_loop_over_a_coreset_loader_trains_as_a_run_bit_for_bit(rule, fraction, every, warm):
    constant = PLAIN.model_copy(update={"schedule": "multistep", "milestones": ()})
    chosen = {"rule": rule, "fraction": fraction, "every_epochs": every, "warm_epochs": warm}
    trained = fit(run(training=constant, **chosen))

    data = split()
    x, y = data.batch(range(N))
    model = build_model("mlp", (5,), 3, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    loader = DataLoader(TensorDataset(data.inputs(x), y), batch_size=16)
    loader = CoresetLoader(loader, model, epochs=6, **chosen)
    for _ in range(6):
        model.train()
        for inputs, labels, weights in loader:
            losses = F.cross_entropy(model(inputs), labels, reduction="none")
            loader.record(losses)
            (losses @ weights * (1 / len(labels))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, model.state_dict().values(), trained.model.state_dict().values()))
    assert loader.coreset.indices.equal(trained.coreset.indices)


def test_warm_epochs_see_everything_and_the_first_coreset_comes_after_them():
    first = Coreset.uniform(torch.arange(7))
    trained = fit(run(first, rule="random", warm_epochs=2, every_epochs=3))
    assert [len(picked) for picked in coresets(trained)] == [N, N, 7, 7, 7, 18]
    assert trained.cost.backward == 2 * N + 3 * 7 + 18


@pytest.mark.parametrize("balanced", [True, False])
def test_each_selection_is_by_the_model_of_that_moment(balanced):
    trained = fit(run(rule="gradmatch", every_epochs=2, weighted=True, balanced=balanced))
    diary, data = trained.hooks[-1], trained.split
    model = build_model("mlp", (5,), 3, seed=0)
    for epoch, picked in enumerate(diary.coresets):
        model.load_state_dict(diary.models[epoch - epoch % 2])
        view = head_view(model, plain_batches(data, torch.arange(N), torch.device("cpu")))
        seed = derive(0, "selection", epoch - epoch % 2)
        twin = select(view, 18, "gradmatch", seed=seed, balanced=balanced)
        order = twin.indices.argsort()
        assert picked.indices.equal(twin.indices[order])
        torch.testing.assert_close(picked.weights, twin.weights[order], rtol=1e-3, atol=1e-3)
    bill = {cost.phase: cost for cost in trained.bills()}["select"]
    assert (bill.forward, bill.backward) == (3 * N, 0)


@pytest.mark.parametrize("rule", ["gradmatch", "infobatch", "forgetting"])
def test_stopped_and_resumed_equals_never_stopped(tmp_path, rule):
    class Killed(Exception):
        pass

    def die(model, epoch):
        if epoch == 4:
            raise Killed
        return {}

    chosen = {"rule": rule, "every_epochs": 1, "warm_epochs": 1, "fraction": 1.0 if rule == "infobatch" else 0.2}
    places, straight = StoredCheckpoints(Storage(str(tmp_path))), fit(run(**chosen))
    with pytest.raises(Killed):
        fit(run(**chosen), checkpoints=places, measure=die)
    resumed = fit(run(**chosen), checkpoints=places)
    assert coresets(resumed) == coresets(straight)[3:]
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert a.equal(b)
    assert [bill.forward for bill in straight.bills()] == [bill.forward for bill in resumed.bills()]


def test_infobatch_is_unbiased_and_keeps_what_is_hard():
    losses = torch.rand(200, generator=generator(0, "losses")) ** 2
    record = Record(torch.zeros(200, dtype=torch.int64), losses, torch.zeros(200))
    total, draws = torch.zeros(200), 2000
    for draw in range(draws):
        picked = coreset["infobatch"](record, rng=generator(0, draw), options={"ratio": 0.7})
        total.index_add_(0, picked.indices, picked.weights)
    hard = losses >= losses.mean()
    assert (total[hard] == draws).all()
    assert (total[~hard] / draws - 1).abs().max() < 5 * (0.7 / 0.3 / draws) ** 0.5  # five standard deviations
    assert (total[~hard].mean() / draws).item() == pytest.approx(1, abs=0.02)


def test_infobatch_without_losses_or_near_the_end_keeps_all():
    unseen = Record.empty(torch.zeros(5, dtype=torch.int64))
    seen = Record(unseen.y, torch.arange(5.0), unseen.forgotten)
    for record, progress in [(unseen, 0.0), (seen, 0.875), (seen, 1.0)]:
        picked = coreset["infobatch"](record, rng=generator(0), progress=progress, options={})
        assert picked.indices.tolist() == [0, 1, 2, 3, 4] and picked.weights.eq(1).all()


def recorded(n, epochs):
    """Return the record of n samples after epochs of one step: samples seen, their losses, and which were right."""
    recorder = Recorder(torch.zeros(n, dtype=torch.int64))
    for indices, losses, right in epochs:
        seen = Seen(torch.tensor(indices), torch.tensor(losses).float(), torch.tensor(right).bool())
        run = SimpleNamespace(seen=seen, worker=Worker(), cost=Cost("train"))
        recorder.on_step(run)
        recorder.on_epoch_end(run)
    return recorder.record


def test_forgetting_counts_by_hand():
    rights = [[1, 1, 0, 0, 1], [0, 1, 0, 1, 0], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1]]
    record = recorded(5, [(range(5), [number] * 5, right) for number, right in enumerate(rights)])
    assert record.forgotten.tolist() == [2, 0, torch.inf, 1, 1]
    assert record.losses.tolist() == [3.0] * 5
    assert coreset["forgetting"](record, 2, rng=generator(0)).indices.tolist() == [2, 0]
    ties = {tuple(coreset["forgetting"](record, 3, rng=generator(seed)).indices.tolist()) for seed in range(9)}
    assert ties == {(2, 0, 3), (2, 0, 4)}


def test_a_sample_not_seen_in_an_epoch_keeps_its_record():
    record = recorded(3, [([0, 1], [1, 1], [1, 1]), ([1], [0], [0]), ([0, 1], [0, 1], [0, 1])])
    assert record.forgotten.tolist() == [1, 1, torch.inf]
    assert record.losses.tolist() == [0, 1, torch.inf]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warm_epochs": 8}, "select.warm_epochs = 8 of 8 epochs: nothing would be selected"),
        ({"every_epochs": 7, "warm_epochs": 2}, "select.every_epochs = 7: only 6 epochs follow the warm ones"),
        ({"rule": "craig", "fraction": 1.0}, "craig with select.fraction = 1 would keep every sample"),
    ],
)
def test_a_selection_that_would_not_come_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check_schedule(Reselect(**settings), 8)


def test_a_sample_that_was_never_seen_is_not_forgotten():
    record = Record(
        torch.zeros(4, dtype=torch.int64),
        torch.tensor([1.0, torch.inf, 1, 1]),
        torch.tensor([1, torch.inf, 0, torch.inf]),
    )
    assert coreset["forgetting"](record, 3, rng=generator(0)).indices.tolist() == [3, 0, 2]

"""The loop against plain PyTorch, and what it promises about weights, order, resuming and bad luck."""

import shutil
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gloo import on_workers
from raypkg.core.errors import UserError
from raypkg.core.settings import Training
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.batches import Batches, ahead, plain_batches
from raypkg.engine.loop import evaluate, fit, output_of
from raypkg.engine.run import Hook, Run, learning_rate
from raypkg.engine.worker import Cost, Worker
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage

PLAIN = Training(epochs=4, batch_size=16, lr=0.1, precision="float32")


def split(n=64, classes=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator)
    return Split.from_tensors(x, torch.arange(n) % classes)


def model():
    torch.manual_seed(1)
    return nn.Linear(6, 3)


def run(coreset=None, settings=PLAIN, hooks=(), network=None, seed=0):
    return Run.simple(network or model(), split(), settings, hooks=hooks, coreset=coreset, seed=seed)


def weights(trained):
    return [w.detach().clone() for w in trained.model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_equals_a_loop_written_out():
    trained = fit(run())
    twin, data = model(), split()
    x = (data.batch(torch.arange(64))[0] - torch.tensor(data.mean)) / torch.tensor(data.std)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for epoch in range(4):
        batches = Batches(data, trained.coreset, 16, seed=0, augment=(), worker=Worker())
        for number, batch in enumerate(batches.epoch(epoch)):
            optimizer.param_groups[0]["lr"] = learning_rate(PLAIN, (epoch + number / 4) / 4)
            optimizer.zero_grad()
            F.cross_entropy(twin(x[batch.indices]), data.y[batch.indices]).backward()
            optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(trained), twin.parameters(), strict=True))


def test_same_seed_same_result_and_global_generator_untouched():
    networks = [model() for _ in range(3)]
    state = torch.get_rng_state()
    first, again, other = (weights(fit(run(network=n, seed=s))) for n, s in zip(networks, (0, 0, 1), strict=True))
    assert same(first, again)
    assert not same(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("length", "last", "steps"), [(None, None, 16), (2.4, None, 10), (None, 2.4, 10), (3.4, 2.4, 10), (3, 2.4, 10)]
)
def test_stopped_and_resumed_equals_never_stopped_also_within_an_epoch(tmp_path, length, last, steps):
    def die(network, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        return {}

    def started():
        return replace(run(hooks=[Rates()]), length=length, last=last)

    straight = fit(started())
    places = StoredCheckpoints(Storage(str(tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        fit(started(), checkpoints=places, measure=die)
    assert places.load()["step"] == 8
    resumed = fit(started(), checkpoints=places)
    assert same(weights(straight), weights(resumed))
    assert straight.step == resumed.step == steps  # of 4 an epoch
    assert straight.bills()[0].backward == resumed.bills()[0].backward == steps * 16
    expected = [learning_rate(PLAIN, step / 4 / (length or PLAIN.epochs)) for step in range(steps)]
    assert straight.hooks[0].rates == resumed.hooks[0].rates == pytest.approx(expected)


def test_whole_epochs_are_the_same_bits_whether_given_or_not():
    plain = fit(run())
    assert same(weights(plain), weights(fit(replace(run(), length=4))))
    assert same(weights(plain), weights(fit(replace(run(), last=4))))


def test_a_run_that_stopped_in_between_goes_on_in_the_same_process():
    class Doubled(Hook):
        def on_start(self, run):
            for parameter in run.model.parameters():
                parameter.data.mul_(2)

    straight = fit(run(hooks=[Doubled()]))
    twice = run(hooks=[Doubled()])
    twice.last = 2
    fit(twice)
    twice.last = 4
    fit(twice)
    assert same(weights(twice), weights(straight))
    assert (twice.rows, twice.step) == (straight.rows, straight.step)


def trained_on(worker, folders, last=None):
    """Train on workers of which each sees the checkpoints of its own folder; return epoch, steps and weights."""
    places = StoredCheckpoints(Storage(folders[worker.rank]), keep=4)
    here = Run.simple(model(), split(), PLAIN, worker=worker)
    here.last = last
    fit(here, checkpoints=places)
    return here.epoch, here.step, [w.tolist() for w in here.model.parameters()]


def test_workers_go_on_from_one_checkpoint_though_they_see_several(tmp_path):
    straight = on_workers(2, trained_on, [str(tmp_path / "straight")] * 2)
    both = [str(tmp_path / "first"), str(tmp_path / "second")]
    on_workers(2, trained_on, [both[0]] * 2, 2)
    # What a worker of a lost attempt would write while those of the next one look.
    shutil.copytree(both[0], both[1])
    shutil.copy(tmp_path / "straight" / "epoch_00003.pt", both[1])
    assert on_workers(2, trained_on, both) == straight


def test_rows_that_were_lost_with_a_process_come_again_with_its_checkpoint(tmp_path):
    places, reported = StoredCheckpoints(Storage(str(tmp_path))), []
    stopped = run()
    stopped.last = 2
    fit(stopped, checkpoints=places)  # nobody hears of its two epochs

    fit(replace(run(), worker=Worker(report=reported.append)), checkpoints=places)
    straight = []
    fit(replace(run(), worker=Worker(report=straight.append)))
    bills = [row.pop("bill") for row in [*straight, *reported] if "bill" in row]
    assert [bill["backward"] for bill in bills] == [64, 128, 192, 256, 192, 256]  # the first two are not measured again
    assert reported == straight and [row["epoch"] for row in reported] == [1, 2, 3, 4]


class Rates(Hook):
    """Records the learning rate of every step, also in checkpoints."""

    def __init__(self):
        self.rates = []

    def on_step(self, run):
        self.rates.append(run.optimizer.param_groups[0]["lr"])

    def state_dict(self):
        return {"rates": list(self.rates)}

    def load_state_dict(self, state):
        self.rates = state["rates"]


def test_a_corrupt_newest_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    places = StoredCheckpoints(Storage(str(tmp_path)))
    straight = weights(fit(run(), checkpoints=places))
    newest = sorted(tmp_path.glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    assert same(straight, weights(fit(run(), checkpoints=places)))
    assert "epoch_00004.pt is unreadable and skipped" in caplog.text


def test_a_coreset_without_weight_and_more_workers_than_samples_are_refused():
    with pytest.raises(UserError, match="all 3 weights of the coreset are 0"):
        fit(run(Coreset(torch.arange(3), torch.zeros(3))))
    with pytest.raises(UserError, match="batches of 2 samples cannot be shared by 3 workers"):
        Batches(split(), Coreset.uniform(torch.arange(2)), 16, seed=0, augment=(), worker=Worker(0, 3))


def test_the_newest_checkpoint_is_that_of_the_largest_epoch(tmp_path):
    checkpoints = StoredCheckpoints(Storage(str(tmp_path)))
    assert checkpoints.load() is None
    for epoch in (99_998, 99_999, 100_000):  # names are padded to five digits
        checkpoints.save(epoch, {"epoch": epoch})
    assert checkpoints.load() == {"epoch": 100_000}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_100000.pt", "epoch_99999.pt"]


@pytest.mark.parametrize("world", [2, 3])
def test_workers_share_each_batch(world):
    data = Split.from_tensors(torch.randint(0, 255, (50, 3, 8, 8), dtype=torch.uint8), torch.arange(50) % 2)
    everything = Coreset.uniform(torch.arange(50))
    augment = ("crop", "flip", "randaugment")
    whole, *parts = (
        list(Batches(data, everything, 16, seed=0, augment=augment, worker=worker).epoch(2))
        for worker in (Worker(), *(Worker(rank, world) for rank in range(world)))
    )
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(batch.x, torch.cat([share.x for share in shares]))
        assert torch.equal(batch.indices, torch.cat([share.indices for share in shares]))
        assert {share.total for share in shares} == {len(batch.y)}
    assert sorted(torch.cat([batch.indices for batch in whole]).tolist()) == list(range(50))
    assert [len(batch.y) for batch in whole] == [13, 13, 12, 12]


def test_a_long_epoch_reports_its_steps(monkeypatch):
    monkeypatch.setattr("raypkg.engine.loop.QUIET", 0.0)
    reported = []
    fit(replace(run(), worker=Worker(report=reported.append)))
    assert [each["within"] for each in reported if "within" in each] == [1, 2, 3, 4] * 4
    assert reported[0] == {"phase": "train", "model": None, "epoch": 1, "within": 1, "steps": 4}


def test_evaluation_by_hand():
    network, data = model(), split()
    found = evaluate(network, data, torch.arange(10, 40), Worker(), (cost := Cost("evaluate")), precision="float32")
    assert cost.forward == 30
    ((x, y),) = plain_batches(data, torch.arange(10, 40), torch.device("cpu"), 30)
    assert found["loss"] == pytest.approx(F.cross_entropy(network(x), y).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((network(x).argmax(1) == y).double().mean().item())


@pytest.mark.parametrize(("views", "shifts"), [("mirrored", {0: 1.0}), ("shifted", {0: 0.5, -1: 0.25, 1: 0.25})])
def test_logits_are_averaged_over_views(views, shifts):
    x = torch.randn(5, 2, 6, 4, dtype=torch.float64)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double()
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    expected = 0
    for shift, weight in shifts.items():
        view = padded[:, :, 1 - shift : 7 - shift, 1 - shift : 5 - shift]
        for seen in (view, view.flip(3)):
            expected = expected + weight / 2 * network(seen)
    assert torch.allclose(output_of(network, x, views), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "t", "rate"),
    [
        ({"schedule": "constant"}, 0.9, 1.0),
        ({"schedule": "cosine"}, 0.5, 0.5),
        ({"schedule": "multistep", "milestones": (0.5, 0.75)}, 0.8, 0.01),
        ({"schedule": "linear"}, 0.25, 0.75),
        ({"schedule": "linear", "warmup": 0.2}, 0.1, 0.505),
        ({"schedule": "linear", "warmup": 0.2}, 0.6, 0.5),
        ({"schedule": "linear", "warmup": 0.2}, 1.0, 0.0),
        ({"schedule": "constant", "warmup": 0.2}, 0.3, 1.0),
    ],
)
def test_learning_rates(settings, t, rate):
    assert learning_rate(Training(lr=1.0, **settings), t) == pytest.approx(rate)


def test_costs_add_up():
    one, two = Cost("a", 10, 5, 1.0, 1.0, 100, 7), Cost("a", 20, 6, 3.0, 3.0, 50, 7)
    joined, chained = Cost.joined("a", [one, two]), one.then(two)
    assert (joined.forward, joined.seconds, joined.total_seconds, joined.memory) == (30, 3.0, 4.0, 100)
    assert (chained.forward, chained.seconds, chained.sent) == (30, 4.0, 14)
    assert replace(one).record()["backward"] == 5


def test_waiting_for_batches_is_on_the_bill_of_the_block_that_waits():
    def load(job):
        time.sleep(0.05)
        return job

    with Cost("train") as train:
        for _ in ahead(load, range(4)):
            pass
        with train.apart(Cost("evaluate")), Cost("within") as within:
            list(ahead(load, [1]))
    assert 0 < train.waited <= train.seconds and 0 < within.waited <= within.seconds
    both = Cost.joined("train", [train, replace(train, waited=0.0)])
    assert both.waited == train.waited and train.then(within).waited == train.waited + within.waited
    list(ahead(abs, [1]))  # on no bill


def test_a_hook_with_a_misspelt_method_is_refused_where_it_is_written():
    with pytest.raises(UserError, match=r"'on_gradient', did you mean 'on_gradients'\?"):
        type("Clip", (Hook,), {"on_gradient": lambda self, run: None})

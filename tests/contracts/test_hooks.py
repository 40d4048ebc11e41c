"""Every registered hook trains, resumes as if it had never stopped, and gives two workers one result."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from gloo import on_workers
from raypkg.core.config import Named, load_settings
from raypkg.core.errors import UserError
from raypkg.data.coreset import Coreset
from raypkg.engine.run import Hook, Results, Run, hook
from raypkg.engine.worker import Worker
from raypkg.experiments import experiment, settings_of
from raypkg.experiments.samples import open_samples
from raypkg.experiments.training import Job, train_model
from raypkg.runs.checkpoints import load_tensors
from raypkg.runs.storage import Storage

COMMON = {"model": "mlp", "train.epochs": 4, "train.batch_size": 128, "train.precision": "float64", "seed": 1}
OPTIONS = {  # with which a hook acts within a few epochs
    "crest": {"tau": 0.05, "h": 3, "subset": 0.2},
    "sparse": {"density": 0.2, "growth": "gradient", "update_every_steps": 5},
}
pytestmark = pytest.mark.usefixtures("blank_pictures")
EXPERIMENTS = {"deltagrad": "deltagrad"}  # of hooks that belong to one


def job_of(name, folder, settings=None, **changes):
    kind = EXPERIMENTS.get(name, "train")
    chosen = load_settings(settings_of(experiment[kind]), {}, COMMON | (settings or {}))
    named = Named(name=name, options=OPTIONS.get(name, {}))
    return Job(chosen, chosen.train, Storage(str(folder)), hooks=(named,), **changes)


def content(folder):
    """Return the weights and the tables of a training."""
    storage = Storage(str(folder))
    tables = {name: storage.read_table(name).to_pylist() for name in storage.list() if name.endswith(".parquet")}
    return load_tensors(storage, "model.safetensors"), tables


@pytest.fixture(scope="module", params=list(hook.entries))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def straight(name, tmp_path_factory, blank_pictures):
    """Return the folder and the record of a training that was never stopped, for tests that only look at it."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, train_model(Worker(), job_of(name, folder))


def test_it_trains_and_leaves_results(name, straight, tmp_path):
    folder, record = straight
    assert np.isfinite(record["test_loss"]) and all(isinstance(line, str) for line in record["findings"])
    weights, _ = content(folder)
    assert all(weight.isfinite().all() for weight in weights.values())

    other = job_of(name, tmp_path)
    options = OPTIONS.get(name, {})
    made = hook[name](options=options, job=other, worker=Worker(), samples=open_samples(other.experiment))
    for each in made if isinstance(made, list) else [made]:
        assert isinstance(each, Hook)
        each.close()
        each.close()  # may be called twice


def test_resumed_equals_never_stopped(name, straight, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_model(Worker(report=_interrupt_after(2)), job_of(name, tmp_path))
    train_model(Worker(), job_of(name, tmp_path))

    (weights, tables), (others, other_tables) = content(straight[0]), content(tmp_path)
    assert all(torch.equal(weight, others[key]) for key, weight in weights.items())
    assert str(tables) == str(other_tables)  # NaN is equal to NaN here


def test_batches_in_parts_end_where_whole_ones_do(name, straight, tmp_path):
    train_model(Worker(), job_of(name, tmp_path, {"train.micro_batch": 50}))
    (weights, tables), (others, other_tables) = content(straight[0]), content(tmp_path)
    assert tables.keys() == other_tables.keys()
    torch.testing.assert_close(others, weights, rtol=0, atol=1e-10)


def _interrupt_after(epochs):
    def report(row):
        if row["epoch"] == epochs:
            raise KeyboardInterrupt

    return report


@pytest.mark.slow
def test_two_workers_end_where_one_does(name, straight, tmp_path):
    on_workers(2, train_model, job_of(name, tmp_path))
    torch.testing.assert_close(content(tmp_path)[0], content(straight[0])[0], rtol=0, atol=1e-8)


class Tally(Hook):
    """A user's own: counts steps, and hands over a fact, a finding, a table and a picture."""

    def __init__(self, *, start: int = 0):
        self.count = start

    def on_step(self, run: Run) -> None:
        self.count += 1

    def results(self, run: Run) -> Results:
        def draw(path):
            path.write_bytes(b"a picture")

        counts = pa.table({"count": [self.count]})
        return Results({"counted": self.count}, [f"counted {self.count}"], {"tally": counts}, {"tally": draw})

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def named_of(monkeypatch, **hooks):
    for name, function in hooks.items():
        monkeypatch.setitem(hook._entries, name, hook._entry(name, function, ""))
    return [{"name": name} for name in hooks]


def train_with(named, folder, **changes):
    chosen = load_settings(settings_of(experiment["train"]), {"hooks": named}, COMMON | {"train.epochs": 1})
    return train_model(Worker(), Job(chosen, chosen.train, Storage(str(folder)), **changes))


class Unreadable(Tally):
    def state_dict(self):
        return {"count": np.float64(1.0)}


def leaving(results):
    class Leaving(Hook):
        def results(self, run: Run) -> Results:
            return results

    return Leaving


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Unreadable, "holds something that is neither a tensor nor a plain value"),
        (leaving(Results(facts={"count": torch.ones(1)})), "hook Leaving: its facts must be plain values"),
        (leaving(Results(facts={"test_accuracy": 1.0})), "'test_accuracy' is a fact of the run's own"),
        (leaving(Results(tables={"coreset": pa.table({"a": [1]})})), r"coreset\.parquet is a file of the run's own"),
    ],
)
def test_what_a_hook_must_not_leave_is_refused(tmp_path, monkeypatch, made, message):
    with pytest.raises(UserError, match=message):
        train_with(named_of(monkeypatch, made=made), tmp_path)


def test_hooks_that_contradict_each_other_are_refused(tmp_path):
    for named, changes, message in (
        ([{"name": "crest"}] * 2, {}, "hook 'crest' is named twice"),
        ([{"name": "crest"}], {"coreset": Coreset.uniform(torch.arange(300))}, "hook Crest chooses the batches: a co"),
    ):
        with pytest.raises(UserError, match=message):
            train_with(named, tmp_path, **changes)


def test_hooks_act_by_priority(tmp_path, monkeypatch):
    seen = []

    class Noted(Hook):
        def on_gradients(self, run):
            seen.append(type(self).priority)

    class First(Noted):
        priority = 0

    class Last(Noted):
        priority = 100

    train_with(named_of(monkeypatch, last=Last, mine=Noted, first=First), tmp_path)
    assert seen[:6] == [0, 50, 100] * 2


def test_what_a_hook_of_the_user_leaves_is_kept(tmp_path, monkeypatch):
    (named,) = named_of(monkeypatch, tally=Tally)
    record = train_with([named | {"options": {"start": 5}}], tmp_path)
    assert record["counted"] == 5 + 11 and record["findings"] == ["counted 16"]
    assert content(tmp_path)[1]["tally.parquet"] == [{"count": 16}]
    assert (tmp_path / "plots" / "tally.png").read_bytes() == b"a picture"
    (named,) = named_of(monkeypatch, tally=Tally)
    assert "counted" not in train_with([named], tmp_path / "prepared", phase="pretrain")  # only prepares

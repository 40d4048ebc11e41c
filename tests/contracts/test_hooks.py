"""Every registered hook trains, resumes as if it had never stopped, and gives two workers one result."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from gloo import on_workers
from raypkg.core.config import load_settings
from raypkg.engine.run import Hook, Results, Run, hook
from raypkg.engine.worker import Worker
from raypkg.experiments import experiment, settings_of
from raypkg.phases.samples import open_samples
from raypkg.phases.training import Job, train_model
from raypkg.runs.checkpoints import load_tensors
from raypkg.runs.storage import Storage

COMMON = {"model": "mlp", "train.epochs": 4, "train.batch_size": 128, "train.precision": "float64", "seed": 1}
USED_BY = {  # the experiment that a hook belongs to, and settings that let it act within a few epochs
    "agent": ("train", {}),
    "crest": ("crest", {"budget": 1.0, "crest.h": 3, "crest.subset": 0.2}),
    "deltagrad": ("deltagrad", {}),
    "sparse": ("sparse", {"density": 0.2, "growth": "gradient", "update_every_steps": 5}),
}


def job_of(name, folder, **changes):
    kind, settings = USED_BY.get(name, ("train", {}))
    chosen = load_settings(settings_of(experiment[kind]), {}, COMMON | settings)
    return Job(chosen, chosen.train, Storage(str(folder)), hooks=(name,), **changes)


def content(folder):
    """Return the weights and the tables of a training."""
    storage = Storage(str(folder))
    tables = {name: storage.read_table(name) for name in storage.list() if name.endswith(".parquet")}
    return load_tensors(storage, "model.safetensors"), tables


@pytest.fixture(params=list(hook.entries))
def name(request):
    return request.param


def test_it_trains_and_leaves_results(name, tmp_path):
    job = job_of(name, tmp_path)
    record = train_model(Worker(), job)
    assert np.isfinite(record["test_loss"]) and all(isinstance(line, str) for line in record["findings"])
    weights, _ = content(tmp_path)
    assert all(weight.isfinite().all() for weight in weights.values())

    made = hook[name](job=job_of(name, tmp_path / "other"), worker=Worker(), samples=open_samples(job.experiment))
    for each in made if isinstance(made, list) else [made]:
        assert isinstance(each, Hook)
        each.close()
        each.close()  # may be called twice


def test_resumed_equals_never_stopped(name, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train_model(Worker(), job_of(name, straight))
    interrupted = job_of(name, stopped, last=2)
    with pytest.raises(KeyboardInterrupt):
        train_model(Worker(report=_interrupt_after(2)), dataclasses.replace(interrupted, last=None))
    train_model(Worker(), job_of(name, stopped))

    (weights, tables), (others, other_tables) = content(straight), content(stopped)
    assert all(torch.equal(weight, others[key]) for key, weight in weights.items())
    assert {key: table.to_pylist() for key, table in tables.items()}.keys() == other_tables.keys()
    for key, table in tables.items():
        assert str(table.to_pylist()) == str(other_tables[key].to_pylist())  # NaN is equal to NaN here


def _interrupt_after(epochs):
    def report(row):
        if row["epoch"] == epochs:
            raise KeyboardInterrupt

    return report


@pytest.mark.slow
def test_two_workers_end_where_one_does(name, tmp_path):
    train_model(Worker(), job_of(name, tmp_path / "one"))
    on_workers(2, train_model, job_of(name, tmp_path / "two"))
    (weights, _), (others, _) = content(tmp_path / "one"), content(tmp_path / "two")
    for key, weight in weights.items():
        assert torch.allclose(weight, others[key], rtol=0, atol=1e-8), key


def test_a_hook_without_results_leaves_none():
    assert Hook().results(None) == Results()
    assert not Hook().supplies_batches and Hook().state_dict() == {}


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


def test_what_a_hook_of_the_user_leaves_is_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(hook.entries, "tally", hook._entry("tally", Tally, ""))
    named = [{"name": "tally", "options": {"start": 5}}]
    chosen = load_settings(settings_of(experiment["train"]), {"hooks": named}, COMMON)
    record = train_model(Worker(), Job(chosen, chosen.train, Storage(str(tmp_path))))
    steps = 4 * 11
    assert record["counted"] == 5 + steps and record["findings"] == [f"counted {5 + steps}"]
    assert content(tmp_path)[1]["tally.parquet"].to_pylist() == [{"count": 5 + steps}]
    assert (tmp_path / "plots" / "tally.png").read_bytes() == b"a picture"

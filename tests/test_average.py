"""The average of the weights: its values, the batch statistics in it, and that no stop changes it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gloo import on_workers
from raypkg.core.config import Named, load_settings
from raypkg.core.errors import UserError
from raypkg.data.split import Split
from raypkg.engine.loop import evaluate, fit
from raypkg.engine.run import Hook, Run
from raypkg.engine.worker import Worker
from raypkg.experiments import experiment, settings_of
from raypkg.experiments.samples import SAMPLES, Samples, new_model, open_samples
from raypkg.experiments.training import Average, Job, train_model
from raypkg.runs.checkpoints import load_tensors
from raypkg.runs.storage import Storage
from reference import averaged

COMMON = {
    "model": "airbench",
    "model.options.width": 2,
    "dataset.augment": "crop:1:reflect,altflip",
    "train.epochs": 3,
    "train.precision": "float64",
    "train.evaluate_every_epochs": 1,
    "train.average": 0.9,
}
pytestmark = pytest.mark.usefixtures("blank_pictures")


def job_of(folder, kind="train", **settings):
    chosen = load_settings(settings_of(experiment[kind]), {}, COMMON | settings)
    return Job(chosen, chosen.train, Storage(str(folder)))


def kept(folder):
    return load_tensors(Storage(str(folder)), "model.safetensors")


class Trace(Hook):
    """Copies the state at the start and after every step."""

    def __init__(self):
        self.states = []

    def on_start(self, run):
        self.on_step(run)

    def on_step(self, run):
        self.states.append({name: value.clone() for name, value in run.model.state_dict().items()})


@pytest.mark.parametrize("decay", [0.5, 0.98])
@pytest.mark.parametrize("part", [None, 5])
def test_it_is_its_slow_twin_with_running_statistics(decay, part):
    split = Split.from_tensors(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    trace, average = Trace(), Average(decay)
    fit(
        Run.simple(model, split, hooks=[trace, average], epochs=3, batch_size=10, precision="float64", micro_batch=part)
    )
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    expected = averaged(trace.states, decay)
    with average.within(model):
        inside = {name: value.clone() for name, value in model.state_dict().items()}
    assert inside.keys() == expected.keys() == trained.keys()
    assert all(torch.allclose(inside[name], value, rtol=0, atol=1e-12) for name, value in expected.items())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in trained.items())


def test_what_is_measured_tested_and_kept_is_the_average(tmp_path):
    job = job_of(tmp_path, **{"train.keep": "best", "train.evaluate_views": "shifted"})
    rows = []
    record = train_model(Worker(report=rows.append), job)
    samples = open_samples(job.experiment)
    model = new_model(job.experiment, samples.data).double()
    model.load_state_dict(kept(tmp_path))
    precise = {"precision": "float64", "views": "shifted"}
    assert evaluate(model, samples.data.test, **precise)["accuracy"] == record["test_accuracy"]
    held_out = evaluate(model, samples.data.train, samples.held_out, **precise)
    assert held_out["loss"] == pytest.approx(rows[record["kept_epoch"] - 1]["valid_loss"], abs=1e-12)
    forward = next(bill["forward"] for bill in record["costs"] if bill["phase"] == "evaluate")
    assert forward == 6 * (3 * len(samples.held_out) + len(samples.data.test))


@pytest.mark.parametrize("stop", [1, 3])
def test_stopped_after_any_epoch_and_resumed_equals_never_stopped(tmp_path, stop):
    def interrupt(row):
        if row["epoch"] == stop:
            raise KeyboardInterrupt

    straight = train_model(Worker(), job_of(tmp_path / "straight"))
    with pytest.raises(KeyboardInterrupt):
        train_model(Worker(report=interrupt), job_of(tmp_path / "stopped"))
    resumed = train_model(Worker(), job_of(tmp_path / "stopped"))
    one, other = kept(tmp_path / "straight"), kept(tmp_path / "stopped")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert straight["test_loss"] == resumed["test_loss"]


@pytest.mark.slow
def test_two_workers_keep_the_average_of_one(tmp_path):
    group = {"model.options.norm": "group"}  # batch statistics are those of a worker's slice
    one = train_model(Worker(), job_of(tmp_path / "one", **group))
    two, _ = on_workers(2, train_model, job_of(tmp_path / "two", **group))
    assert one["test_accuracy"] == two["test_accuracy"]
    for name, weight in kept(tmp_path / "one").items():
        assert torch.allclose(weight, kept(tmp_path / "two")[name], rtol=0, atol=1e-8), name


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("sparse", {"train.average": 0.9}, "train.average = 0.9: masks change, so the average would be denser"),
        ("deltagrad", {"train.average": 0.9}, "train.average = 0.9: DeltaGrad is derived for SGD without momentum"),
        ("train", {"train.average": 1.0}, "train.average"),
    ],
)
def test_it_is_refused_where_it_would_be_wrong(kind, settings, message):
    with pytest.raises(UserError, match=message):
        load_settings(settings_of(experiment[kind]), {}, settings)


def test_views_of_rows_are_refused(tmp_path):
    rows = Samples.all_of(Split.from_tensors(torch.randn(6, 4), torch.arange(6) % 2))
    job = job_of(tmp_path, **{"train.evaluate_views": "mirrored"})
    with pytest.raises(UserError, match=r"train\.evaluate_views = mirrored: the samples are no images"):
        train_model(Worker(local={SAMPLES: rows}), job)


def test_crest_has_no_turns_to_flip_by(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.augment = altflip: CREST draws samples without regard"):
        train_model(Worker(), replace(job_of(tmp_path), hooks=(Named(name="crest"),)))

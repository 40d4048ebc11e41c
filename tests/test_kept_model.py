"""The model that training keeps, of the best epoch or averaged: which it is, and that no stop changes it."""

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
from raypkg.experiments import experiment, settings_of, training
from raypkg.experiments.samples import SAMPLES, Samples, new_model, open_samples
from raypkg.experiments.training import Average, Job, train_model
from raypkg.runs.checkpoints import StoredCheckpoints, load_tensors
from raypkg.runs.storage import Storage
from reference import averaged

EPOCHS = 6
COMMON = {"train.precision": "float64", "train.evaluate_every_epochs": 1}
BEST = {"model": "mlp", "train.epochs": EPOCHS, "train.keep": "best", "seed": 1}
AVERAGE = {
    "model": "airbench", "model.options.width": 2, "dataset.augment": "crop:1:reflect,altflip", "train.epochs": 3,
    "train.average": 0.9,
}  # fmt: skip
GROUP = {**AVERAGE, "model.options.norm": "group"}  # batch statistics are those of a worker's slice
pytestmark = pytest.mark.usefixtures("blank_pictures")


def job_of(folder, kind="train", base=BEST, **settings):
    chosen = load_settings(settings_of(experiment[kind]), {}, COMMON | base | settings)
    hooks = chosen.hooks_used if kind == "sparse" else ()
    return Job(chosen, chosen.train, Storage(str(folder)), hooks=hooks)


def interrupted(job, stop):
    """Stop a training after an epoch."""

    def interrupt(row):
        if row["epoch"] == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_model(Worker(report=interrupt), job)


@pytest.fixture
def accuracies(monkeypatch):
    """Return a function that has the epochs of a training measured with these accuracies."""

    def measured_with(*values):
        rows = ({"valid_loss": 1.0, "accuracy": value} for value in values)
        monkeypatch.setattr(training, "measure_held_out", lambda *arguments, **options: next(rows))

    return measured_with


@pytest.fixture
def epochs(monkeypatch):
    """Return the weights after every epoch of the trainings of a test."""
    seen = {}
    save = StoredCheckpoints.save

    def watched(self, epoch, state):
        seen[epoch] = {name: value.clone() for name, value in state["model"].items()}
        save(self, epoch, state)

    monkeypatch.setattr(StoredCheckpoints, "save", watched)
    return seen


def kept(folder):
    return load_tensors(Storage(str(folder)), "model.safetensors")


def model_of(job, folder):
    samples = open_samples(job.experiment)
    model = new_model(job.experiment, samples.data).double()
    model.load_state_dict(kept(folder))
    return model, samples


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("measured", "best", "every"),
    [
        ((0.1, 0.2, 0.9, 0.3, 0.9, 0.4), 3, 1),  # the first of equals
        ((0.0, 0.0, 0.0, 0.0, 0.0, 0.1), 6, 1),
        ((0.0, 0.0, 0.0, 0.0, 0.0, 0.0), 1, 1),
        ((0.5, 0.4, 0.3), 2, 2),
        ((0.5, 0.4, 0.3), None, 2),  # the last one's
    ],
)
def test_the_model_is_that_of_the_best_evaluated_or_of_the_last_epoch(
    tmp_path, accuracies, epochs, measured, best, every
):
    accuracies(*measured)
    keep = "best" if best else "last"
    record = train_model(Worker(), job_of(tmp_path, **{"train.evaluate_every_epochs": every, "train.keep": keep}))
    assert same(kept(tmp_path), epochs[best or EPOCHS])
    assert record.get("kept_epoch") == best
    said = "".join(record["findings"])
    assert best is None or f"epoch {best} of 6, the best of {len(measured)} on" in said
    assert best is None or f"{max(measured):.2%}" in said


@pytest.mark.parametrize("kind", ["train", "sparse"])
def test_the_test_accuracy_is_that_of_the_model_that_is_kept(tmp_path, accuracies, kind):
    accuracies(0.1, 0.8, 0.1, 0.1, 0.1, 0.1)
    sparse = {"density": 0.3, "growth": "gradient", "compute": "sparse", "update_every_steps": 3}
    job = job_of(tmp_path, kind, **(sparse if kind == "sparse" else {}))
    record = train_model(Worker(), job)
    assert record["kept_epoch"] == 2
    model, samples = model_of(job, tmp_path)
    tested = evaluate(model, samples.data.test, precision="float64")
    assert record["test_accuracy"] == tested["accuracy"]
    assert record["test_loss"] == pytest.approx(tested["loss"], abs=1e-12)


@pytest.mark.parametrize(("base", "stop"), [(BEST, 4), (BEST, EPOCHS), (AVERAGE, 1), (AVERAGE, 3)])
def test_stopped_after_any_epoch_and_resumed_equals_never_stopped(tmp_path, accuracies, base, stop):
    measured = [0.1, 0.8, 0.2, 0.8, 0.9, 0.3]
    accuracies(*measured)
    straight = train_model(Worker(), job_of(tmp_path / "straight", base=base))
    accuracies(*measured)
    interrupted(job_of(tmp_path / "stopped", base=base), stop)
    accuracies(*measured[stop:])
    resumed = train_model(Worker(), job_of(tmp_path / "stopped", base=base))
    assert same(kept(tmp_path / "straight"), kept(tmp_path / "stopped"))
    for name in straight.keys() - {"costs"}:
        assert straight[name] == resumed[name], name


@pytest.mark.parametrize("stop", [3, 4])
def test_training_stops_when_no_better_epoch_comes_and_stays_stopped(tmp_path, accuracies, stop):
    job = job_of(tmp_path, **{"train.patience": 2})
    accuracies(0.1, 0.8, 0.2, 0.8)
    interrupted(job, stop)
    accuracies(0.8)
    rows = []
    record = train_model(Worker(report=rows.append), job)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] and record["kept_epoch"] == 2
    assert "epoch 2 of 4, the best of 4" in record["findings"][0]
    assert record["findings"][0].endswith("; training stopped early, 2 evaluations after it")


@pytest.mark.slow
@pytest.mark.parametrize("base", [BEST, GROUP], ids=["best", "average"])
def test_two_workers_keep_the_model_of_one(tmp_path, base):
    one = train_model(Worker(), job_of(tmp_path / "one", base=base))
    two, _ = on_workers(2, train_model, job_of(tmp_path / "two", base=base))
    assert one["test_accuracy"] == two["test_accuracy"] and one.get("kept_epoch") == two.get("kept_epoch")
    for name, weight in kept(tmp_path / "one").items():
        assert torch.allclose(weight, kept(tmp_path / "two")[name], rtol=0, atol=1e-8), name


def test_the_best_by_no_held_out_sample_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there are no held-out samples to go by, raise dataset\.validation"):
        train_model(Worker(), job_of(tmp_path, **{"dataset.validation": 1e-6}))


# The average of the weights


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
    job = job_of(tmp_path, base=AVERAGE, **{"train.keep": "best", "train.evaluate_views": "shifted"})
    rows = []
    record = train_model(Worker(report=rows.append), job)
    model, samples = model_of(job, tmp_path)
    precise = {"precision": "float64", "views": "shifted"}
    assert evaluate(model, samples.data.test, **precise)["accuracy"] == record["test_accuracy"]
    held_out = evaluate(model, samples.data.train, samples.held_out, **precise)
    assert held_out["loss"] == pytest.approx(rows[record["kept_epoch"] - 1]["valid_loss"], abs=1e-12)
    forward = next(bill["forward"] for bill in record["costs"] if bill["phase"] == "evaluate")
    assert forward == 6 * (3 * len(samples.held_out) + len(samples.data.test))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sparse", "train.average = 0.9: masks change, so the average would be denser"),
        ("deltagrad", "train.average = 0.9: DeltaGrad is derived for SGD without momentum"),
    ],
)
def test_it_is_refused_where_it_would_be_wrong(kind, message):
    with pytest.raises(UserError, match=message):
        load_settings(settings_of(experiment[kind]), {}, {"train.average": 0.9})


def test_views_of_rows_and_turns_of_crest_to_flip_by_are_refused(tmp_path):
    rows = Samples.all_of(Split.from_tensors(torch.randn(6, 4), torch.arange(6) % 2))
    job = job_of(tmp_path, base=AVERAGE, **{"train.evaluate_views": "mirrored"})
    with pytest.raises(UserError, match=r"train\.evaluate_views = mirrored: the samples are no images"):
        train_model(Worker(local={SAMPLES: rows}), job)
    with pytest.raises(UserError, match=r"dataset\.augment = altflip: CREST draws samples without regard"):
        train_model(Worker(), replace(job_of(tmp_path, base=AVERAGE), hooks=(Named(name="crest"),)))

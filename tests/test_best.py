"""The model of the best epoch: which it is, what is told of it, and that no stop changes it."""

import pytest
import torch

from gloo import on_workers
from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.engine.loop import evaluate
from raypkg.engine.worker import Worker
from raypkg.experiments import experiment, settings_of, training
from raypkg.experiments.samples import new_model, open_samples
from raypkg.experiments.training import Job, train_model
from raypkg.runs.checkpoints import StoredCheckpoints, load_tensors
from raypkg.runs.storage import Storage

EPOCHS = 6
COMMON = {
    "model": "mlp",
    "train.epochs": EPOCHS,
    "train.precision": "float64",
    "train.evaluate_every_epochs": 1,
    "train.keep": "best",
    "seed": 1,
}
pytestmark = pytest.mark.usefixtures("blank_pictures")


def job_of(folder, kind="train", **settings):
    chosen = load_settings(settings_of(experiment[kind]), {}, COMMON | settings)
    hooks = chosen.hooks_used if kind == "sparse" else ()
    return Job(chosen, chosen.train, Storage(str(folder)), hooks=hooks)


@pytest.fixture
def accuracies(monkeypatch):
    """Return a function that has the epochs of a training measured with these accuracies."""

    def measured_with(*values):
        left = list(values)

        def measure(*arguments, **options):
            return {"valid_loss": 1.0, "accuracy": left.pop(0)}

        monkeypatch.setattr(training, "measure_held_out", measure)

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


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("measured", "best", "every"),
    [
        ((0.1, 0.2, 0.9, 0.3, 0.9, 0.4), 3, 1),  # the first of equals
        ((0.0, 0.0, 0.0, 0.0, 0.0, 0.1), 6, 1),
        ((0.0, 0.0, 0.0, 0.0, 0.0, 0.0), 1, 1),
        ((0.5, 0.4, 0.3), 2, 2),
    ],
)
def test_the_model_is_that_of_the_best_evaluated_epoch(tmp_path, accuracies, epochs, measured, best, every):
    accuracies(*measured)
    record = train_model(Worker(), job_of(tmp_path, **{"train.evaluate_every_epochs": every}))
    assert same(kept(tmp_path), epochs[best])
    assert record["kept_epoch"] == best
    (finding,) = record["findings"]
    assert f"epoch {best} of 6, the best of {len(measured)} on" in finding and f"{max(measured):.2%}" in finding


def test_the_last_model_is_kept_without_it(tmp_path, epochs):
    record = train_model(Worker(), job_of(tmp_path, **{"train.keep": "last"}))
    assert same(kept(tmp_path), epochs[EPOCHS]) and "kept_epoch" not in record


@pytest.mark.parametrize("kind", ["train", "sparse"])
def test_the_test_accuracy_is_that_of_the_model_that_is_kept(tmp_path, accuracies, kind):
    accuracies(0.1, 0.8, 0.1, 0.1, 0.1, 0.1)
    sparse = {"density": 0.3, "growth": "gradient", "compute": "sparse", "update_every_steps": 3}
    job = job_of(tmp_path, kind, **(sparse if kind == "sparse" else {}))
    record = train_model(Worker(), job)
    assert record["kept_epoch"] == 2
    samples = open_samples(job.experiment)
    model = new_model(job.experiment, samples.data).double()
    model.load_state_dict(kept(tmp_path))
    tested = evaluate(model, samples.data.test, precision="float64")
    assert record["test_accuracy"] == tested["accuracy"]
    assert record["test_loss"] == pytest.approx(tested["loss"], abs=1e-12)


@pytest.mark.parametrize("stop", [4, EPOCHS])
def test_stopped_after_any_epoch_and_resumed_equals_never_stopped(tmp_path, accuracies, stop):
    measured = [0.1, 0.8, 0.2, 0.8, 0.9, 0.3]
    accuracies(*measured)
    straight = train_model(Worker(), job_of(tmp_path / "straight"))

    def interrupt(row):
        if row["epoch"] == stop:
            raise KeyboardInterrupt

    accuracies(*measured)
    with pytest.raises(KeyboardInterrupt):
        train_model(Worker(report=interrupt), job_of(tmp_path / "stopped"))
    accuracies(*measured[stop:])
    resumed = train_model(Worker(), job_of(tmp_path / "stopped"))
    assert same(kept(tmp_path / "straight"), kept(tmp_path / "stopped"))
    for name in ("kept_epoch", "findings", "test_accuracy", "test_loss"):
        assert straight[name] == resumed[name], name


@pytest.mark.parametrize("stop", [3, 4])
def test_training_stops_when_no_better_epoch_comes_and_stays_stopped(tmp_path, accuracies, stop):
    def interrupt(row):
        if row["epoch"] == stop:
            raise KeyboardInterrupt

    accuracies(0.1, 0.8, 0.2, 0.8)
    with pytest.raises(KeyboardInterrupt):
        train_model(Worker(report=interrupt), job_of(tmp_path, **{"train.patience": 2}))
    accuracies(0.8)
    rows = []
    record = train_model(Worker(report=rows.append), job_of(tmp_path, **{"train.patience": 2}))
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] and record["kept_epoch"] == 2
    assert "epoch 2 of 4, the best of 4" in record["findings"][0]
    assert record["findings"][0].endswith("; training stopped early, 2 evaluations after it")


@pytest.mark.slow
def test_two_workers_keep_the_epoch_that_one_does(tmp_path):
    one = train_model(Worker(), job_of(tmp_path / "one"))
    two, _ = on_workers(2, train_model, job_of(tmp_path / "two"))
    assert one["kept_epoch"] == two["kept_epoch"]
    assert one["test_accuracy"] == two["test_accuracy"]
    for name, weight in kept(tmp_path / "one").items():
        assert torch.allclose(weight, kept(tmp_path / "two")[name], rtol=0, atol=1e-8), name


def test_the_best_by_no_held_out_sample_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"by held-out samples, and there are none: raise dataset\.validation"):
        train_model(Worker(), job_of(tmp_path, **{"dataset.validation": 1e-6}))

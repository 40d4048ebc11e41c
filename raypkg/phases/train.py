"""Training one model by DDP on Ray Train workers, resumable at every epoch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raypkg.cluster.train import launch
from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment, Train, Training
from raypkg.engine.costs import Cost
from raypkg.engine.loop import Run, evaluate, fit
from raypkg.engine.worker import Worker
from raypkg.methods.coreset import Coreset
from raypkg.runs.checkpoints import StoredCheckpoints, load_model, save_model
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .samples import Samples, augmentations, new_model, samples


@dataclass(frozen=True)
class Job:
    """What every worker is told: settings, places and sample positions.

    Attributes:
        phase: names the rows of metrics, the bill and the checkpoints.
        initial: file of the run folder with the first weights; None = drawn from the seed.
        result: file of the run folder for the last ones.
    """

    experiment: Experiment
    training: Training
    storage: Storage
    phase: str
    coreset: Coreset
    result: str
    initial: str | None = None


def train_on_cluster(job: Job, report: Report) -> dict[str, Any]:
    """Train the job's model on the cluster, unless the run folder says it is done; return the phase's record."""
    return report.phase(
        job.phase,
        lambda: launch(
            train_model,
            job,
            cluster=job.experiment.cluster,
            report=report,
            folder=job.storage.root + "/ray",
            most=min(len(job.coreset), job.training.batch_size),
        ),
        epochs=job.training.epochs,
    )


def train_model(worker: Worker, job: Job) -> dict[str, Any]:
    """Train on all workers and evaluate at the end; return the bills and accuracies."""
    found = samples(job.experiment.dataset, job.experiment.seed)
    data, training = found.data, job.training
    model = new_model(job.experiment, data)
    if job.initial:
        model.load_state_dict(load_model(job.storage, job.initial))
    run = Run(
        model=synchronised(model, training, worker),
        split=data.train,
        coreset=job.coreset,
        settings=training,
        seed=job.experiment.seed,
        phase=job.phase,
        worker=worker,
        augment=augmentations(job.experiment.dataset, data),
        cost=Cost(job.phase),
    )

    def measure(model: nn.Module, epoch: int) -> dict[str, float]:
        due = training.evaluate_every and epoch % training.evaluate_every == 0
        return validate(model, found, worker, training, run.measuring) if due else {}

    fit(run, checkpoints=StoredCheckpoints(job.storage / "checkpoints" / job.phase), measure=measure)
    everything = torch.arange(len(data.test))
    test = evaluate(run.model, data.test, everything, worker, run.measuring, precision=training.precision)
    if worker.rank == 0:
        save_model(job.storage, job.result, run.model.state_dict())
    return {
        "costs": [bill.record() for bill in run.bills()],
        "test_loss": test["loss"],
        "test_accuracy": test["accuracy"],
        "workers": worker.world,
    }


def synchronised(model: nn.Module, settings: Training, worker: Worker) -> nn.Module:
    """Share batch statistics over the workers where the settings ask for it.

    Raises:
        UserError: on a CPU, where PyTorch has no such layer.
    """
    if not (isinstance(settings, Train) and settings.sync_bn and worker.world > 1):
        return model
    if worker.device.type == "cpu":
        raise UserError("train.sync_bn = true needs GPUs: PyTorch has no synchronised batch norm on the CPU")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def validate(model: nn.Module, found: Samples, worker: Worker, settings: Training, cost: Cost) -> dict[str, float]:
    """Return loss and accuracy on the held-out samples, or nothing where none are held out."""
    if not len(found.valid):
        return {}
    result = evaluate(model, found.data.train, found.valid, worker, cost, precision=settings.precision)
    return {"valid_loss": result["loss"], "accuracy": result["accuracy"]}

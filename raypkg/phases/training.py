"""Training one model by DDP on Ray Train workers, on a coreset that may be selected anew, resumable at every epoch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from raypkg.cluster.launch import launch
from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment, Reselect, Train, Training
from raypkg.coresets.budgets import budget_of
from raypkg.coresets.recorder import Recorder
from raypkg.coresets.reselection import Reselection, check_schedule
from raypkg.data.coreset import Coreset
from raypkg.engine.costs import Cost
from raypkg.engine.loop import evaluate, fit
from raypkg.engine.run import Hook, Run
from raypkg.engine.shards import WorkerShards, class_shards
from raypkg.engine.worker import Worker
from raypkg.runs.checkpoints import StoredCheckpoints, load_model, save_model
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .coreset_files import origin, save_coreset, save_record, save_scores
from .samples import Samples, augmentations, new_model, samples

MODEL = "model.safetensors"


@dataclass(frozen=True)
class Job:
    """What every worker is told: settings, places and sample positions.

    Attributes:
        phase: names the rows of metrics, the bill and the checkpoints.
        coreset: to begin with; None = selected by the first model.
        result: file of the run folder for the last weights; the record of training goes beside it.
        initial: file of the run folder with the first weights; None = drawn from the seed.
        select: how to select where no coreset is given, and when to select anew.
        last: the epoch to stop after; None = the last of the schedule.
    """

    experiment: Experiment
    training: Training
    storage: Storage
    phase: str
    coreset: Coreset | None
    result: str
    initial: str | None = None
    select: Reselect = field(default_factory=Reselect)
    last: int | None = None

    @property
    def selects(self) -> bool:
        """Whether training selects by itself."""
        return self.coreset is None or self.select.every > 0

    def fewest(self, found: Samples) -> int:
        """Return the size of the smallest batch: no more workers than that have work."""
        budget = budget_of(self.select.fraction, len(found.kept)) if self.selects else self.training.batch_size
        sizes = [self.training.batch_size, budget, *([] if self.coreset is None else [len(self.coreset)])]
        return min(sizes)


def train_on_cluster(job: Job, report: Report, train: Callable[..., dict[str, Any]] | None = None) -> dict[str, Any]:
    """Train the job's model on the cluster, unless the run folder says it is done; return the phase's record.

    Args:
        job: what to train.
        report: progress and run folder.
        train: what every worker does; None = ``train_model``.
    """
    if job.selects or job.select.warm:
        check_schedule(job.select, job.training.epochs)
    found = samples(job.experiment.dataset, job.experiment.seed)
    return report.phase(
        job.phase,
        lambda: launch(
            train or train_model,
            job,
            cluster=job.experiment.cluster,
            report=report,
            folder=job.storage.root + "/ray",
            most=job.fewest(found),
        ),
        epochs=job.last or job.training.epochs,
    )


def train_model(worker: Worker, job: Job, hooks: Sequence[Hook] = ()) -> dict[str, Any]:
    """Train on all workers, with further hooks, and evaluate at the end; return the bills and accuracies."""
    found = samples(job.experiment.dataset, job.experiment.seed)
    data, training = found.data, job.training
    model = new_model(job.experiment, data)
    if job.initial:
        model.load_state_dict(load_model(job.storage, job.initial))
    recorder = Recorder(data.train.y)
    shards = class_shards(data, data.train.y, found.kept, found.valid, worker.world, worker.device)
    chooser = Reselection(job.select, WorkerShards(shards, worker), recorder, found.kept, job.coreset)
    run = Run(
        model=synchronised(model, training, worker),
        split=data.train,
        coreset=Coreset.uniform(found.kept) if job.coreset is None else job.coreset,
        settings=training,
        seed=job.experiment.seed,
        phase=job.phase,
        worker=worker,
        augment=augmentations(job.experiment.dataset, data),
        cost=Cost(job.phase),
        hooks=[recorder, chooser, *hooks],
        last=job.last,
    )

    def measure(model: nn.Module, epoch: int) -> dict[str, float]:
        due = training.evaluate_every and epoch % training.evaluate_every == 0
        return measure_held_out(model, found, worker, training, run.bill("evaluate")) if due else {}

    fit(run, checkpoints=StoredCheckpoints(job.storage / "checkpoints" / job.phase), measure=measure)
    everything = torch.arange(len(data.test))
    test = evaluate(run.model, data.test, everything, worker, run.bill("evaluate"), precision=training.precision)
    if worker.rank == 0:
        save_model(job.storage, job.result, run.model.state_dict())
        save_record(job.storage, job.result, recorder.record)
        if job.selects:
            facts = {**origin(job.experiment), "epochs": training.epochs, **job.select.model_dump()}
            scores = save_scores(job.storage, data.train, found.kept, chooser.scores)
            save_coreset(job.storage, run.coreset, data.train, facts, scores)
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


def measure_held_out(
    model: nn.Module, found: Samples, worker: Worker, settings: Training, cost: Cost
) -> dict[str, float]:
    """Return loss and accuracy on the held-out samples, or nothing where none are held out."""
    if not len(found.valid):
        return {}
    result = evaluate(model, found.data.train, found.valid, worker, cost, precision=settings.precision)
    return {"valid_loss": result["loss"], "accuracy": result["accuracy"]}

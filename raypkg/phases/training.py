"""Training one model by DDP on Ray Train workers, on a coreset that may be selected anew, resumable at every epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raypkg.cluster.launch import launch
from raypkg.core.config import Named
from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment, Reselect, Train, Training
from raypkg.coresets.budgets import budget_of
from raypkg.coresets.recorder import Recorder
from raypkg.coresets.reselection import Reselection, check_schedule
from raypkg.data.coreset import Coreset
from raypkg.engine.costs import Cost
from raypkg.engine.loop import evaluate, fit
from raypkg.engine.run import Hook, Run, Selected, hook
from raypkg.engine.shards import WorkerShards, class_shards
from raypkg.engine.worker import Worker
from raypkg.runs.checkpoints import StoredCheckpoints, load_tensors, save_tensors
from raypkg.runs.plots import save_plot
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .coreset_files import origin, save_coreset, save_record, save_scores
from .samples import Samples, augmentations, new_model, open_samples

MODEL = "model.safetensors"


@dataclass(frozen=True)
class Job:
    """What every worker is told: settings, places and sample positions.

    Attributes:
        phase: names the rows of metrics, the bill and the checkpoints.
        hooks: of the method, by their registered names; those of the settings come before them.
        coreset: to begin with; None = selected by the first model, or all samples where nothing selects.
        select: when and how to select; None = never.
        result: file of the run folder for the last weights; the record of training goes beside it.
        initial: file of the run folder with the first weights; None = drawn from the seed.
        last: the epoch to stop after; None = the last of the schedule.
        main: whether this is the run's main training.
    """

    experiment: Experiment
    training: Training
    storage: Storage
    phase: str = "train"
    hooks: tuple[str, ...] = ()
    coreset: Coreset | None = None
    select: Reselect | None = None
    result: str = MODEL
    initial: str | None = None
    last: int | None = None
    main: bool = True

    @property
    def selects(self) -> bool:
        """Whether training selects by itself."""
        return self.select is not None and (self.coreset is None or self.select.every_epochs > 0)

    def smallest_batch(self, samples: Samples) -> int:
        """Return the size of the smallest batch: no more workers than that have work."""
        sizes = [self.training.batch_size]
        if self.coreset is not None:
            sizes.append(len(self.coreset))
        if self.selects and self.select:
            sizes.append(budget_of(self.select.fraction, len(samples.kept)))
        return min(sizes)


def train_on_cluster(job: Job, report: Report) -> dict[str, Any]:
    """Train the job's model on the cluster, unless the run folder says it is done; return the phase's record."""
    if job.select and (job.selects or job.select.warm_epochs):
        check_schedule(job.select, job.training.epochs)
    samples = open_samples(job.experiment)

    def work() -> dict[str, Any]:
        return launch(
            train_model,
            job,
            cluster=job.experiment.cluster,
            report=report,
            folder=f"{job.storage.root}/ray",
            most=job.smallest_batch(samples),
        )

    return report.phase(job.phase, work, epochs=job.last or job.training.epochs)


def train_model(worker: Worker, job: Job) -> dict[str, Any]:
    """Train on all workers with the job's hooks, and evaluate at the end; return the bills, figures and findings."""
    samples = open_samples(job.experiment)
    hooks = _hooks(worker, job, samples)
    try:
        run = _run(worker, job, samples, hooks)
        _fit(run, job, samples)
        return _concluded(run, job, samples)
    finally:
        for each in hooks:
            each.close()


def _hooks(worker: Worker, job: Job, samples: Samples) -> list[Hook]:
    """Return the recorder, what selects, the user's hooks and the method's, in this order."""
    train = samples.data.train
    recorder = Recorder(train.y)
    hooks: list[Hook] = [recorder]
    if job.select:
        shards = class_shards(samples.data, train.y, samples.kept, samples.valid, worker.world, worker.device)
        hooks.append(Reselection(job.select, WorkerShards(shards, worker), recorder, samples.kept, job.coreset))
    for named in (*job.experiment.hooks, *(Named(name=name) for name in job.hooks)):
        made = hook[named.name](options=named.options, job=job, worker=worker, samples=samples)
        hooks += made if isinstance(made, Sequence) else [made]
    for each in hooks:
        if not isinstance(each, Hook):
            raise UserError(f"hooks: a {type(each).__name__} is no hook, which is a subclass of raypkg.Hook")
    return hooks


def _run(worker: Worker, job: Job, samples: Samples, hooks: Sequence[Hook]) -> Run:
    model = new_model(job.experiment, samples.data)
    if job.initial:
        model.load_state_dict(load_tensors(job.storage, job.initial))
    return Run(
        model=synchronised(model, job.training, worker),
        split=samples.data.train,
        coreset=samples.everyone if job.coreset is None else job.coreset,
        settings=job.training,
        seed=job.experiment.seed,
        phase=job.phase,
        worker=worker,
        augment=augmentations(job.experiment.dataset, samples.data),
        cost=Cost(job.phase),
        hooks=hooks,
        last=job.last,
        main=job.main,
    )


def _fit(run: Run, job: Job, samples: Samples) -> None:
    every = job.training.evaluate_every_epochs

    def measure(model: nn.Module, epoch: int) -> dict[str, float]:
        if not every or epoch % every:
            return {}
        return measure_held_out(model, samples, run.worker, job.training, run.bill("evaluate"))

    fit(run, checkpoints=StoredCheckpoints(job.storage / "checkpoints" / job.phase), measure=measure)


def _concluded(run: Run, job: Job, samples: Samples) -> dict[str, Any]:
    """Evaluate on the test samples, keep what training left, and return the phase's record."""
    data = samples.data
    everything = torch.arange(len(data.test))
    precision = job.training.precision
    test = evaluate(run.model, data.test, everything, run.worker, run.bill("evaluate"), precision=precision)
    facts: dict[str, Any] = {}
    findings: list[str] = []
    if run.worker.rank == 0:
        save_tensors(job.storage, job.result, run.model.state_dict())
        for each in run.hooks:
            if isinstance(each, Recorder):
                save_record(job.storage, job.result, each.record)
            left = each.results(run)
            for name, table in left.tables.items():
                job.storage.write_table(f"{name}.parquet", table)
            for name, draw in left.plots.items():
                save_plot(job.storage, name, draw)
            if left.selected:
                _save_selected(left.selected, job, samples)
            facts |= left.facts
            findings += left.findings
    return {
        "costs": [bill.record() for bill in run.bills()],
        "test_loss": test["loss"],
        "test_accuracy": test["accuracy"],
        "workers": run.worker.world,
        "findings": findings,
        **facts,
    }


def _save_selected(selected: Selected, job: Job, samples: Samples) -> None:
    split = samples.data.train
    facts = {**origin(job.experiment), **selected.origin}
    scores = save_scores(job.storage, split, selected.indices, selected.scores)
    save_coreset(job.storage, selected.coreset, split, facts, scores)


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
    model: nn.Module, samples: Samples, worker: Worker, settings: Training, cost: Cost
) -> dict[str, float]:
    """Return loss and accuracy on the held-out samples, or nothing where none are held out."""
    if not len(samples.valid):
        return {}
    split = samples.data.train
    result = evaluate(model, split, samples.valid, worker, cost, precision=settings.precision)
    return {"valid_loss": result["loss"], "accuracy": result["accuracy"]}

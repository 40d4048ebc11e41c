"""Training one model by DDP on Ray Train workers, on a coreset that may be selected anew, resumable at every epoch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from raypkg.cluster.workers import Workers
from raypkg.core.config import Named
from raypkg.core.errors import UserError, shown
from raypkg.core.settings import Experiment, Reselect, Train, Training
from raypkg.coresets.budgets import budget_of
from raypkg.coresets.record import Recorder
from raypkg.coresets.reselection import Reselection, check_schedule
from raypkg.data.coreset import Coreset
from raypkg.data.split import at_hand
from raypkg.engine.batches import dtype_of
from raypkg.engine.costs import Cost
from raypkg.engine.hooks import Hook, Results, Selected, hook
from raypkg.engine.loop import evaluate, fit
from raypkg.engine.run import Run
from raypkg.engine.shards import WorkerShards, class_shards
from raypkg.engine.worker import Worker
from raypkg.runs.checkpoints import StoredCheckpoints, load_tensors, save_tensors
from raypkg.runs.folder import GROWING, MODEL, NAME, NEEDED
from raypkg.runs.plots import save_plot
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .best import BestEpoch
from .coreset_files import FILE, SCORES, keep_selected, origin, record_of, save_record
from .first_weights import FIRST, FirstWeights
from .samples import Samples, augmentations, new_model, samples_on
from .summary import LEFT_OUT


@dataclass(frozen=True)
class Job:
    """What every worker is told: settings, places and sample positions.

    Attributes:
        phase: names the rows of metrics, the bill and the checkpoints.
        hooks: of the method, by their registered names, with their options.
        coreset: to begin with; None = selected by the first model, or all samples where nothing selects.
        select: when and how to select; None = never.
        result: file of the run folder for the weights that are kept; the record of training goes beside it.
        initial: file of the run folder with the first weights; None = drawn from the seed.
        last: the epoch to stop after; None = the last of the schedule.
        main: whether this is the run's main training, in which the hooks of the settings take part as well.
    """

    experiment: Experiment
    training: Training
    storage: Storage
    phase: str = "train"
    hooks: tuple[Named, ...] = ()
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

    def samples_used(self, samples: Samples) -> int:
        """Return how many samples training begins with."""
        return len(samples.train_indices) if self.coreset is None else len(self.coreset)

    def smallest_batch(self, samples: Samples) -> int:
        """Return the size of the smallest batch: no more workers than that have work."""
        sizes = [self.training.batch_size]
        if self.coreset is not None:
            sizes.append(len(self.coreset))
        if self.selects and self.select:
            sizes.append(budget_of(self.select.fraction, len(samples.train_indices)))
        return min(sizes)


def train_on_cluster(job: Job, samples: Samples, report: Report, workers: Workers) -> dict[str, Any]:
    """Train the job's model on the workers, unless the run folder says it is done; return the phase's record."""
    if job.select:
        check_schedule(job.select, job.training.epochs, given=job.coreset is not None)
    workers.limit(job.smallest_batch(samples))

    def work() -> dict[str, Any]:
        return workers.run(train_model, job)

    record = report.phase(job.phase, work, epochs=job.last or job.training.epochs)
    if job.main:  # a run's last work for them
        workers.release()
    return record


def train_model(worker: Worker, job: Job) -> dict[str, Any]:
    """Train on all workers with the job's hooks, and evaluate at the end; return the bills, figures and findings."""
    samples = samples_on(worker, job.experiment)
    with ExitStack() as closing:
        hooks = _hooks(worker, job, samples, closing)
        run = _run(worker, job, samples, hooks)
        _fit(run, job, samples)
        return _concluded(run, job, samples)


def _hooks(worker: Worker, job: Job, samples: Samples, closing: ExitStack) -> list[Hook]:
    """Return the recorder, what selects, and the hooks of method and user, in the order in which they act."""
    train = samples.data.train
    recorder = Recorder(train.y)
    hooks: list[Hook] = [recorder, *_of_main_training(job, samples)]
    if job.select:
        shards = class_shards(
            samples.data, train.y, samples.train_indices, samples.held_out, worker.world, worker.device
        )
        hooks.append(
            Reselection(job.select, WorkerShards(shards, worker), recorder, samples.train_indices, job.coreset)
        )
    named = [*job.hooks, *job.experiment.hooks] if job.main else list(job.hooks)
    names = [each.name for each in named]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"hook {repeated!r} is named twice, or is the method's own already")
    for each in named:
        made = hook[each.name](options=each.options, job=job, worker=worker, samples=samples)
        for one in made if isinstance(made, Sequence) else [made]:
            if not isinstance(one, Hook):
                raise UserError(f"hook {each.name!r} gave an object of type {type(one).__name__}, not a raypkg.Hook")
            closing.callback(one.close)
            hooks.append(one)
    _check_suppliers(hooks, job)
    return sorted(hooks, key=lambda one: one.priority)


def _of_main_training(job: Job, samples: Samples) -> Iterator[Hook]:
    """Yield what begins with the weights of another training, and what keeps the best epoch, where that is asked for.

    Raises:
        UserError: there are no samples to tell the best epoch by.
    """
    settings = job.training
    if not (job.main and isinstance(settings, Train)):
        return
    if settings.from_ is not None:
        yield FirstWeights(load_tensors(job.storage, FIRST), settings.from_)
    if settings.keep == "best":
        if not len(samples.held_out):
            raise UserError("train.keep = best is by held-out samples, and there are none: raise dataset.validation")
        yield BestEpoch()


def _check_suppliers(hooks: Sequence[Hook], job: Job) -> None:
    """Refuse hooks that choose the batches beside others that do, or beside a coreset, which would do nothing."""
    suppliers = [type(one).__name__ for one in hooks if one.supplies_batches]
    if len(suppliers) > 1:
        raise UserError(f"hooks {' and '.join(suppliers)} both choose the batches: leave one of them out")
    if suppliers and (job.select or job.coreset is not None):
        raise UserError(f"hook {suppliers[0]} chooses the batches: a coreset or a selection would do nothing")


def _run(worker: Worker, job: Job, samples: Samples, hooks: Sequence[Hook]) -> Run:
    model = new_model(job.experiment, samples.data)
    if job.initial:
        model.load_state_dict(load_tensors(job.storage, job.initial))
    split = samples.data.train
    coreset = samples.everyone if job.coreset is None else job.coreset
    is_part = job.coreset is not None or job.experiment.dataset.only is not None
    if is_part and not job.selects:  # the same part all the time
        split = at_hand(split, coreset.indices)
    return Run(
        model=synchronised(model, job.training, worker),
        split=split,
        coreset=coreset,
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
    best = _best_epoch(run)

    def measure(model: nn.Module, epoch: int) -> dict[str, float]:
        if not every or epoch % every:
            return {}
        measured = measure_held_out(model, samples, run.worker, job.training, run.bill("evaluate"))
        if best:
            best.take(model, epoch, measured["accuracy"])
        return measured

    fit(run, checkpoints=StoredCheckpoints(job.storage / "checkpoints" / job.phase), measure=measure)


def _concluded(run: Run, job: Job, samples: Samples) -> dict[str, Any]:
    """Evaluate on the test samples, keep what training left, and return the phase's record."""
    model = _kept_model(run, job, samples)
    test = evaluate(model, samples.data.test, None, run.worker, run.bill("evaluate"), precision=job.training.precision)
    kept = _keep(run, model, job, samples) if run.worker.rank == 0 else {}
    record = {
        "costs": [bill.record() for bill in run.bills()],
        "test_loss": test["loss"],
        "test_accuracy": test["accuracy"],
        "workers": run.worker.world,
        "main": job.main,
    }
    of_the_manifest = {*NEEDED["summary.json"], *LEFT_OUT} - {"findings"}  # those are the hooks' own
    taken = record.keys() | of_the_manifest
    if clash := kept.keys() & taken:
        raise UserError(f"hooks: {min(clash)!r} is a fact of the run's own, which no hook may leave")
    return record | kept


def _best_epoch(run: Run) -> BestEpoch | None:
    return next((each for each in run.hooks if isinstance(each, BestEpoch)), None)


def _kept_model(run: Run, job: Job, samples: Samples) -> nn.Module:
    """Return the model that training ends with: the last epoch's, or that of the best one."""
    best = _best_epoch(run)
    if best is None:
        return run.model
    # A new one: hooks may have changed how the last epoch's model computes, such as with which weights.
    model = new_model(job.experiment, samples.data)
    model.to(run.worker.device, dtype_of(run.model)).to(memory_format=torch.channels_last)
    model.load_state_dict(best.weights)
    return model


def _keep(run: Run, model: nn.Module, job: Job, samples: Samples) -> dict[str, Any]:
    """Write the model, the record of training and what the hooks left; return their facts and findings."""
    save_tensors(job.storage, job.result, model.state_dict())
    facts: dict[str, Any] = {}
    findings: list[str] = []
    for each in run.hooks:
        if isinstance(each, Recorder):
            save_record(job.storage, job.result, each.record)
        left = _checked_results(each, run)
        for name, table in left.tables.items():
            job.storage.write_table(_file_of(name, job), table)
        for name, draw in left.plots.items():
            save_plot(job.storage, name, draw)
        if left.selected:
            chosen = left.selected
            provenance = {**origin(job.experiment), **chosen.origin}
            keep_selected(
                job.storage, samples.data.train, chosen.coreset, provenance, chosen.indices, chosen.scores, FILE
            )
        facts |= left.facts
        findings += left.findings
    return {**facts, "findings": findings}


def _checked_results(hook: Hook, run: Run) -> Results:
    """Return what a hook leaves.

    Raises:
        UserError: it is no Results, or has facts that JSON cannot hold.
    """
    left = hook.results(run)
    kind = type(hook).__name__
    if not isinstance(left, Results):
        raise UserError(f"hook {kind}: results() returned a {type(left).__name__}, not raypkg.engine.hooks.Results")
    if wrong := _wrong_part(left):
        raise UserError(f"hook {kind}: results() has {wrong} of another kind than raypkg.engine.hooks.Results says")
    for name in (*left.tables, *left.plots):
        if not NAME.fullmatch(name):
            raise UserError(f"hook {kind}: {shown(name)} cannot be the name of a file: letters, digits and . _ - only")
    try:
        json.dumps(left.facts)
    except (TypeError, ValueError) as error:
        raise UserError(f"hook {kind}: its facts must be plain values: {error}") from None
    return left


def _wrong_part(left: Results) -> str | None:
    """Return the first part of a hook's results that is not of its kind."""
    facts, findings, tables, plots, selected = left
    fits = {
        "facts": isinstance(facts, Mapping),
        "findings": isinstance(findings, list | tuple) and all(isinstance(line, str) for line in findings),
        "tables": isinstance(tables, Mapping) and all(isinstance(table, pa.Table) for table in tables.values()),
        "plots": isinstance(plots, Mapping) and all(callable(draw) for draw in plots.values()),
        "selected": selected is None or isinstance(selected, Selected),
    }
    return next((part for part, good in fits.items() if not good), None)


def _file_of(table: str, job: Job) -> str:
    """Return the file of a hook's table; of a training that only prepares, the phase's name stands before it.

    Raises:
        UserError: it is a file of the run's own.
    """
    file = f"{table}.parquet" if job.main else f"{job.phase}_{table}.parquet"
    if file in (FILE, SCORES, GROWING, record_of(job.result)):
        raise UserError(f"hooks: {file} is a file of the run's own, which no hook may leave")
    return file


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
    if not len(samples.held_out):
        return {}
    split = samples.data.train
    result = evaluate(model, split, samples.held_out, worker, cost, precision=settings.precision)
    return {"valid_loss": result["loss"], "accuracy": result["accuracy"]}

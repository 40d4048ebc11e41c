"""Training of one model by DDP on the run's workers, on a coreset or all samples; resumes at every epoch."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from raypkg.cluster.workers import Workers
from raypkg.core.config import Named
from raypkg.core.errors import UserError
from raypkg.core.registry import imported
from raypkg.core.settings import Experiment, Reselect, Train, Training
from raypkg.coresets.record import Record, Recorder
from raypkg.data.coreset import Coreset
from raypkg.data.kinds import IMAGES
from raypkg.data.split import at_hand
from raypkg.engine.batches import dtype_of
from raypkg.engine.loop import TRACE, evaluate, fit
from raypkg.engine.run import Hook, Results, Run, hook
from raypkg.engine.worker import Cost, Worker, whole
from raypkg.models.classifier import classifier
from raypkg.runs.checkpoints import StoredCheckpoints, load_tensors, save_tensors
from raypkg.runs.folder import CORESET, GROWING, MODEL, SCORES, Manifest
from raypkg.runs.plots import save_plot
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .samples import Samples, augmentations, new_model, samples_on
from .summary import LEFT_OUT
from .trained import FIRST, FirstWeights

MAIN = "train"  # phase of a run's main training; others prepare it


@dataclass(frozen=True)
class Job:
    """The order for one training, sent to all workers; each builds its ``Run`` from it."""

    experiment: Experiment
    training: Training
    storage: Storage  # the run folder
    phase: str = MAIN  # name in the metrics, on the bill and of the checkpoints
    hooks: tuple[Named, ...] = ()  # of the method; those of the settings join them in the main training
    coreset: Coreset | None = None  # to start on; None = the first selection, or all samples
    select: Reselect | None = None
    initial: str | None = None  # file of the run folder with the first weights; None = drawn from the seed
    result: str = MODEL  # file of the run folder for the trained weights
    length: float | None = None  # epochs of the schedule, if not whole
    last: float | None = None  # epochs to train; None = the schedule's

    @property
    def main(self) -> bool:
        """Whether this is the run's main training."""
        return self.phase == MAIN

    @property
    def reselect(self) -> Reselect | None:
        """The selection, if training selects by itself."""
        return self.select if self.select and (self.coreset is None or self.select.every_epochs) else None

    def samples_used(self, samples: Samples) -> int:
        """Return the number of samples that training begins with."""
        return len(samples.train_indices) if self.coreset is None else len(self.coreset)


def train_on_cluster(job: Job, samples: Samples, report: Report, workers: Workers) -> dict[str, Any]:
    """Train the job's model on the workers, unless the run folder says it is done; return the phase's record."""
    if job.select:
        from raypkg.coresets.sharded import check_schedule

        check_schedule(job.select, job.training.epochs, given=job.coreset is not None)
    smallest_batch = min(job.training.batch_size, job.samples_used(samples))
    if job.reselect:
        from raypkg.coresets.budgets import budget_of

        smallest_batch = min(smallest_batch, budget_of(job.reselect.fraction, len(samples.train_indices)))
    workers.limit(smallest_batch)  # more workers would have nothing to do
    epochs = math.ceil(job.last or job.training.epochs)
    record = report.phase(job.phase, lambda: workers.run(train_model, job), epochs=epochs)
    if job.main:  # the last work for the workers
        workers.release()
    return record


def train_model(worker: Worker, job: Job) -> dict[str, Any]:
    """Train on all workers with the job's hooks, and evaluate at the end; return the phase's record."""
    samples = samples_on(worker, job.experiment)
    settings = job.training
    with ExitStack() as closing:
        hooks = _hooks(worker, job, samples, closing)
        best = next((each for each in hooks if isinstance(each, BestEpoch)), None)
        averaged = next((each.within for each in hooks if isinstance(each, Average)), nullcontext)
        functions = {}
        for name in ("loss", "metric"):
            given = getattr(settings, name, None)
            functions[name] = given and imported(f"train.{name}", given)
        views = settings.evaluate_views if isinstance(settings, Train) else "plain"
        options: dict[str, Any] = {"precision": settings.precision, "views": views, "metric": functions["metric"]}
        if views != "plain" and samples.data.train.kind is not IMAGES:
            raise UserError(f"train.evaluate_views = {views}: the samples are no images, {views} ones do not exist")
        model = new_model(job.experiment, samples.data)
        if job.reselect:
            from raypkg.coresets.rules import coreset as coreset_rule

            if coreset_rule[job.reselect.rule].sees == "gradients":
                classifier(model, f"select.rule = {job.reselect.rule}")
        if job.initial:
            model.load_state_dict(load_tensors(job.storage, job.initial))
        split = samples.data.train
        coreset = samples.everyone if job.coreset is None else job.coreset
        is_part = job.coreset is not None or job.experiment.dataset.only is not None
        if is_part and not job.reselect:  # the same part in all epochs
            split = at_hand(split, coreset.indices)
        sharded = job.main and job.experiment.cluster.strategy == "fsdp"
        if sharded and worker.world == 1:
            raise UserError("cluster.strategy = fsdp does nothing with one worker")
        traces = job.main and job.experiment.track.profile and worker.rank == 0
        run = Run(
            model=synchronised(model, settings, worker),
            split=split,
            coreset=coreset,
            settings=settings,
            seed=job.experiment.seed,
            phase=job.phase,
            worker=worker,
            augment=augmentations(job.experiment.dataset, samples.data),
            cost=Cost(job.phase),
            hooks=hooks,
            length=job.length,
            last=job.last,
            main=job.main,
            sharded=sharded,
            loss=functions["loss"],
            trace=partial(job.storage.write, TRACE) if traces else None,
        )

        def measure(model: nn.Module, epoch: int) -> dict[str, float]:
            every = settings.evaluate_every_epochs
            if not every or epoch % every:
                return {}
            with averaged(model):
                measured = measure_held_out(model, samples, worker, run.bill("evaluate"), **options)
                if best:
                    run.stopped = best.take(model, epoch, measured)
            return measured

        fit(run, checkpoints=StoredCheckpoints(job.storage / "checkpoints" / job.phase), measure=measure)
        trained = run.model
        closing.enter_context(averaged(trained))
        if best:  # a new model: hooks may have changed how the last epoch's model computes
            trained = new_model(job.experiment, samples.data)
            trained.to(worker.device, dtype_of(run.model)).to(memory_format=torch.channels_last)
            trained.load_state_dict(best.weights)
        test = evaluate(trained, samples.data.test, None, worker, run.bill("evaluate"), **options)
        weights = whole(trained.state_dict())
        left = _keep(run, weights, job, samples) if worker.rank == 0 else {}
        record = {
            "costs": [bill.record() for bill in run.bills()],
            **{f"test_{name}": value for name, value in test.items()},
            "workers": worker.world,
            "main": job.main,
        }
    of_the_manifest = {*Manifest.model_fields, *LEFT_OUT} - {"findings"}
    if clash := left.keys() & (record.keys() | of_the_manifest):
        raise UserError(f"hooks: {min(clash)!r} is a fact of the run's own, which no hook may leave")
    return record | left


def _hooks(worker: Worker, job: Job, samples: Samples, closing: ExitStack) -> list[Hook]:
    split = samples.data.train
    settings = job.training
    recorder = Recorder(split.y)
    hooks: list[Hook] = [recorder]
    if job.main and isinstance(settings, Train):
        if settings.from_ is not None:
            hooks.append(FirstWeights(load_tensors(job.storage, FIRST), settings.from_))
        if settings.keep == "best":
            if not len(samples.held_out):
                raise UserError("train.keep = best: there are no held-out samples to go by, raise dataset.validation")
            hooks.append(BestEpoch(settings.best_by, settings.patience))
        if settings.average is not None:
            hooks.append(Average(settings.average))
    if job.select:
        from raypkg.coresets.sharded import Reselection
        from raypkg.engine.shards import WorkerShards, class_shards

        indices = samples.train_indices
        shards = class_shards(samples.data, split.y, indices, samples.held_out, worker.world, worker.device)
        hooks.append(Reselection(job.select, WorkerShards(shards, worker), recorder, indices, job.coreset))

    named = [*job.hooks, *(job.experiment.hooks if job.main else ())]
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
    suppliers = [type(one).__name__ for one in hooks if one.supplies_batches]
    others = suppliers[1:] or ["a coreset or a selection"] * bool(job.select or job.coreset is not None)
    if suppliers and others:
        raise UserError(f"hook {suppliers[0]} chooses the batches: {others[0]} would do nothing")
    return sorted(hooks, key=lambda one: one.priority)


def _keep(run: Run, weights: dict[str, Tensor], job: Job, samples: Samples) -> dict[str, Any]:
    """Write the model, the record of training and the results of the hooks; return their facts and findings."""
    storage = job.storage
    save_tensors(storage, job.result, weights)
    facts: dict[str, Any] = {}
    findings: list[str] = []
    if run.trace:
        there = TRACE in storage.list()
        findings = [f"{TRACE}: steps of epoch 2" if there else "no trace: training ended in its first steps of epoch 2"]
    for each in run.hooks:
        if isinstance(each, Recorder):
            save_record(storage, job.result, each.record)
        left = each.results(run)
        try:
            json.dumps(left.facts)
        except (TypeError, ValueError) as error:
            raise UserError(f"hook {type(each).__name__}: its facts must be plain values: {error}") from None
        for name, table in left.tables.items():
            file = f"{name}.parquet" if job.main else f"{job.phase}_{name}.parquet"
            if file in (CORESET, SCORES, GROWING, record_of(job.result)):
                raise UserError(f"hooks: {file} is a file of the run's own, which no hook may leave")
            storage.write_table(file, table)
        for name, draw in left.plots.items():
            save_plot(storage, name, draw)
        if chosen := left.selected:
            from .coreset_files import save_coreset

            save_coreset(storage, chosen.coreset, samples, job.experiment, chosen.origin, chosen.indices, chosen.scores)
        facts |= left.facts
        findings += left.findings
    return {**facts, "findings": findings}


class Average(Hook):
    """Holds the average w̄ ← d w̄ + (1 − d) w after step t with d = min(decay, (1 + t) / (10 + t)), for quick starts.

    It covers the weights and the running statistics of batch norm. Checkpoints have it.
    """

    priority = 200  # averages what pruning leaves

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.averages: dict[str, Tensor] = {}

    def on_start(self, run: Run) -> None:
        """Begin with the first weights."""
        state = run.model.state_dict()
        self.averages = {name: tensor.clone() for name, tensor in state.items() if tensor.is_floating_point()}

    def on_step(self, run: Run) -> None:
        """Move the average towards the weights."""
        decay = min(self.decay, (1 + run.step) / (10 + run.step))
        state = run.model.state_dict()
        for name, average in self.averages.items():
            average.lerp_(state[name], 1 - decay)

    @contextmanager
    def within(self, model: nn.Module) -> Iterator[None]:
        """Give a model the averages inside the block."""
        trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(trained | self.averages)
        try:
            yield
        finally:
            model.load_state_dict(trained)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages."""
        return dict(self.averages)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them on the model's device."""
        for name, average in self.averages.items():
            average.copy_(state[name])


class BestEpoch(Hook):
    """Holds the weights of the epoch with the best held-out figure, the first of equals. Checkpoints have them."""

    sharded = True

    def __init__(self, by: str | None = None, patience: int | None = None) -> None:
        self._by = by
        self._patience = patience
        self.waited = 0  # evaluations since the best
        self.epoch = 0  # 0 = none yet
        self.score = -math.inf
        self.figure = ""
        self.measured = 0  # epochs
        self.weights: dict[str, Tensor] = {}

    def take(self, model: nn.Module, epoch: int, measured: Mapping[str, float]) -> bool:
        """Record an epoch's figures, and copy the weights if it is the best so far; return True to stop training."""
        self.measured += 1
        self.waited += 1
        by = self._by or ("valid_loss" if "perplexity" in measured else "accuracy")
        score = -measured[by] if by == "valid_loss" else measured[by]
        if score > self.score:
            self.waited = 0
            self.epoch = epoch
            self.score = score
            name = "perplexity" if by == "valid_loss" and "perplexity" in measured else by
            figure = f"{measured[name]:.2%}" if name == "accuracy" else f"{measured[name]:.4g}"
            self.figure = f"{name.replace('_', ' ')} {figure}"
            self.weights = {name: tensor.to("cpu", copy=True) for name, tensor in whole(model.state_dict()).items()}
        return self._patience is not None and self.waited >= self._patience

    def results(self, run: Run) -> Results:
        """Return the number of the best epoch."""
        epoch = f"the model is that of epoch {self.epoch} of {run.epoch}"
        best = f"the best of {self.measured} on the held-out samples: {self.figure}"
        stopped = f"; training stopped early, {self.waited} evaluations after it" if run.stopped else ""
        return Results(facts={"kept_epoch": self.epoch}, findings=[f"{epoch}, {best}{stopped}"])

    def state_dict(self) -> dict[str, Any]:
        """Return the best epoch so far, with its weights."""
        return {**vars(self), "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        vars(self).update(state)


def synchronised(model: nn.Module, settings: Training, worker: Worker) -> nn.Module:
    """Share batch statistics over the workers if the settings ask for it; PyTorch has no such layer on a CPU."""
    if not (isinstance(settings, Train) and settings.sync_bn and worker.world > 1):
        return model
    if worker.device.type == "cpu":
        raise UserError("train.sync_bn = true needs GPUs: PyTorch has no synchronised batch norm on the CPU")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def measure_held_out(
    model: nn.Module, samples: Samples, worker: Worker, cost: Cost, **options: Any
) -> dict[str, float]:
    """Return the figures of ``evaluate`` on the held-out samples, or nothing if there are none."""
    if not len(samples.held_out):
        return {}
    result = evaluate(model, samples.data.train, samples.held_out, worker, cost, **options)
    return {"valid_loss": result.pop("loss"), **result}


# The record of training, from which rules select


def record_of(model: str) -> str:
    """Return the file name of a model's record.

    >>> record_of("model.safetensors")
    'model_record.parquet'
    """
    return f"{model.removesuffix('.safetensors')}_record.parquet"


def save_record(storage: Storage, model: str, record: Record) -> None:
    """Write the record of training next to the model's file."""
    never = torch.full_like(record.losses, torch.inf)  # hits or margins that were not recorded
    columns = {"loss": record.losses, "forgotten": record.forgotten, "margin": record.margins}
    table = {name: (never if values is None else values).numpy() for name, values in columns.items()}
    storage.write_table(record_of(model), pa.table(table))


def load_record(storage: Storage, model: str, y: Tensor) -> Record:
    """Return the record of a model, or an empty one if it has none."""
    table = storage.read_table(record_of(model))
    if table is None:
        return Record.empty(y)
    from .coreset_files import column_of

    path = f"{storage.root}/{record_of(model)}"
    if len(table) != len(y):
        raise UserError(f"{path} is of a training on {len(table)} samples, this data set has {len(y)}")
    names = ["loss", "forgotten", *{"margin"}.intersection(table.column_names)]  # earlier versions kept no margins
    return Record(y, *(torch.tensor(column_of(table, name, path, pa.types.is_floating)) for name in names))

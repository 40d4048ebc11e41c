"""Selecting a coreset with a trained model's gradients, where the data is: on a run's workers, or on actors."""

from collections.abc import Callable
from typing import Any, NamedTuple

from raypkg.cluster.actors import hold
from raypkg.cluster.workers import Workers
from raypkg.core.errors import UserError
from raypkg.core.settings import Model, RunSettings, Select
from raypkg.coresets.sharded import Selection, SentModel, select_coreset
from raypkg.coresets.target import target_of
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.shards import Shard, Shards, WorkerShards, class_shards
from raypkg.engine.worker import Worker
from raypkg.runs.catalog import locate
from raypkg.runs.checkpoints import load_tensors
from raypkg.runs.folder import RunFolder
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .coreset_files import FILE, keep_selected, load_coreset, load_record, origin, record_of
from .samples import Samples, samples_on
from .trained import check_has_model, settings_of_trained
from .training import MODEL


class TrainedModel(NamedTuple):
    """A model whose gradients select.

    Attributes:
        architecture: its settings.
        storage: the run folder that has it.
        file: with its weights; the record of its training lies beside.
        precision: of its forward passes.
    """

    architecture: Model
    storage: Storage
    file: str
    precision: str

    def scorer(self, split: Split) -> SentModel:
        """Return the model in a form that travels to whoever holds the data."""
        return SentModel.of(self.architecture, split, load_tensors(self.storage, self.file), self.precision)


def trained_model(settings: RunSettings, folder: RunFolder, run: str, precision: str) -> TrainedModel:
    """Return the model that another run trained.

    Args:
        settings: this run's data set and seed.
        folder: of this run, among whose neighbours the other is looked for by name.
        run: its name or path.
        precision: of the forward passes.

    Raises:
        UserError: no such run, it is not finished or trained no model, or its training samples were others than those
            of this run.
    """
    if not run:
        raise UserError("select needs a model: give --model-from RUN")
    other = locate(folder.storage.parent.parent.root, run, having=MODEL)
    check_has_model(other)
    other.check(record_of(MODEL))
    stored = settings_of_trained(other)
    theirs = origin(stored)
    for name, here in origin(settings).items():
        if theirs[name] != here:
            raise UserError(f"run {other.name} has {name} {theirs[name]}, here it is {here}: give the same")
    return TrainedModel(stored.model, other.storage, MODEL, precision)


def check_target_samples(select: Select, samples: Samples) -> None:
    """Refuse, before any work, a target that is not there or does not suit the training samples.

    Raises:
        UserError: what is wrong.
    """
    target = target_of(select)
    if target:
        target.check(samples.data.train, samples.held_out)


def select_on_actors(
    settings: RunSettings, select: Select, model: TrainedModel, samples: Samples, report: Report
) -> Coreset:
    """Select a coreset on actors that hold the data, and keep it in the run folder, unless it is there already.

    Args:
        settings: data set, cluster and seed.
        select: rule and fraction.
        model: whose gradients select.
        samples: to select from.
        report: progress and run folder.
    """
    check_target_samples(select, samples)
    split = samples.data.train

    def shards_for(holders: int) -> list[Shard]:
        source = settings.dataset if settings.cluster.workers != 0 else samples.data  # this process has it open
        return class_shards(source, split.y, samples.train_indices, samples.held_out, holders)

    def work() -> dict[str, Any]:
        with hold(shards_for, settings.cluster) as shards:
            picked = _select(shards, settings, select, model, samples)
        return _keep(picked, report.folder.storage, settings, select, samples)

    return _selected(work, settings, samples, report)


def select_on_workers(
    settings: RunSettings, select: Select, model: TrainedModel, samples: Samples, report: Report, workers: Workers
) -> Coreset:
    """Select a coreset on the run's workers, and keep it in the run folder, unless it is there already.

    Args:
        settings: data set and seed.
        select: rule and fraction.
        model: whose gradients select.
        samples: to select from.
        report: progress and run folder.
        workers: each of which holds some classes.
    """
    check_target_samples(select, samples)

    def work() -> dict[str, Any]:
        return workers.run(select_together, settings, select, model, report.folder.storage)

    return _selected(work, settings, samples, report)


def select_together(
    worker: Worker, settings: RunSettings, select: Select, model: TrainedModel, storage: Storage
) -> dict[str, Any]:
    """Select on all workers; return the phase's record."""
    samples = samples_on(worker, settings)
    y = samples.data.train.y
    shards = class_shards(samples.data, y, samples.train_indices, samples.held_out, worker.world, worker.device)
    picked = _select(WorkerShards(shards, worker), settings, select, model, samples)
    if worker.rank > 0:
        return {}
    return _keep(picked, storage, settings, select, samples)


def _select(shards: Shards, settings: RunSettings, select: Select, model: TrainedModel, samples: Samples) -> Selection:
    split = samples.data.train
    record = load_record(model.storage, model.file, split.y)
    return select_coreset(shards, model.scorer(split), select, record, samples.train_indices, seed=settings.seed)


def _keep(
    picked: Selection, storage: Storage, settings: RunSettings, select: Select, samples: Samples
) -> dict[str, Any]:
    """Keep a selection in the run folder; return the phase's record."""
    chosen = select.model_dump(include={*Select.model_fields, "model_from"})
    provenance = {**origin(settings), **chosen}
    keep_selected(storage, samples.data.train, picked.coreset, provenance, picked.indices, picked.scores, FILE)
    return {"costs": [picked.cost.record()], "size": len(picked.coreset)}


def _selected(work: Callable[[], dict[str, Any]], settings: RunSettings, samples: Samples, report: Report) -> Coreset:
    """Do the phase's work, unless an earlier attempt did; return the coreset that it left."""
    report.phase("select", work, epochs=0)
    path = f"{report.folder.storage.root}/{FILE}"
    return load_coreset(path, samples.data.train, samples.held_out, settings.dataset.name)

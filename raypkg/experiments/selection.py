"""Selection of a coreset with a trained model's gradients, on the holders of the data: a run's workers, or actors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from raypkg.cluster.actors import hold
from raypkg.cluster.workers import Workers
from raypkg.core.errors import UserError
from raypkg.core.settings import Model, RunSettings, Select
from raypkg.coresets.rules import coreset
from raypkg.coresets.sharded import SentModel, select_coreset, target_of
from raypkg.data.coreset import Coreset
from raypkg.engine.shards import Shard, Shards, WorkerShards, class_shards
from raypkg.engine.worker import Worker
from raypkg.runs.catalog import locate
from raypkg.runs.checkpoints import load_tensors
from raypkg.runs.folder import CORESET, MODEL, RunFolder
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .coreset_files import load_coreset, origin, save_coreset
from .samples import Samples, samples_on
from .train import SelectSettings
from .trained import check_same_tokens, settings_of_trained
from .training import load_record, record_of


class TrainedModel(NamedTuple):
    """A model whose gradients select."""

    architecture: Model
    storage: Storage  # the run folder that contains it
    file: str  # its weights; the record of its training lies beside them
    precision: str  # of its forward passes


Models = Sequence[TrainedModel]  # several for a rule that averages over models


def trained_models(settings: SelectSettings, samples: Samples, folder: RunFolder) -> list[TrainedModel]:
    """Return the models that select: one, or several for a rule that averages; refuse those of other samples."""
    runs = settings.model_from.split(",")
    if "" in runs:
        raise UserError("select needs a model: give --model-from RUN")
    if len(runs) > 1 and "others" not in coreset[settings.rule].declares:
        raise UserError(f"model_from = {settings.model_from}: {settings.rule} selects by one model")
    ours = origin(settings) | {"scale": settings.dataset.scale}
    if not (settings.dataset.validation or settings.dataset.is_drawn):
        del ours["seed"]  # all samples are trained on, whatever the seed
    models = []
    for run in runs:
        other = locate(folder.storage.parent.parent.root, run, having=MODEL)
        stored = settings_of_trained(other, "" if settings.rule == "random" else f"rule {settings.rule}")
        other.check(record_of(MODEL))
        theirs = origin(stored) | {"scale": stored.dataset.scale}
        for name, here in ours.items():
            if theirs[name] != here:
                raise UserError(f"run {other.name} has {name} {theirs[name]}, here it is {here}: give the same")
        data = stored.dataset
        check_same_tokens(settings.dataset, data, samples.data, other.name)
        comparable = data.options == settings.dataset.options and data.only in (None, settings.dataset.only)
        if comparable and data.digest not in (None, samples.digest(data)):
            changed = "its files or its drawn labels changed"
            raise UserError(f"run {other.name} trained on other samples of {data.name}: {changed}")
        models.append(TrainedModel(stored.model, other.storage, MODEL, settings.precision))
    return models


def check_target_samples(select: Select, samples: Samples) -> None:
    """Refuse, before any work, a target that is missing or does not suit the training samples."""
    target = target_of(select)
    if target:
        target.check(samples.data.train, samples.held_out)


def select_in_phase(
    settings: RunSettings,
    select: Select,
    models: Models,
    samples: Samples,
    report: Report,
    workers: Workers | None = None,
) -> Coreset:
    """Select a coreset on the run's workers, or on actors that hold the data, unless the run folder has it already."""
    storage = report.folder.storage

    def shards_for(holders: int) -> list[Shard]:
        source = settings.dataset if settings.cluster.workers != 0 else samples.data  # open in this process
        return class_shards(source, samples.data.train.y, samples.train_indices, samples.held_out, holders)

    def work() -> dict[str, Any]:
        if workers:
            return workers.run(select_together, settings, select, models, storage)
        with hold(shards_for, settings.cluster) as shards:
            return _select(shards, settings, select, models, samples, storage)

    check_target_samples(select, samples)
    report.phase("select", work, epochs=0)
    return load_coreset(f"{storage.root}/{CORESET}", samples, settings.dataset)


def select_together(
    worker: Worker, settings: RunSettings, select: Select, models: Models, storage: Storage
) -> dict[str, Any]:
    """Select on all workers; rank 0 stores the coreset."""
    samples = samples_on(worker, settings)
    y = samples.data.train.y
    shards = class_shards(samples.data, y, samples.train_indices, samples.held_out, worker.world, worker.device)
    kept_in = storage if worker.rank == 0 else None
    return _select(WorkerShards(shards, worker), settings, select, models, samples, kept_in)


def _select(
    shards: Shards, settings: RunSettings, select: Select, models: Models, samples: Samples, storage: Storage | None
) -> dict[str, Any]:
    """Select on the shards, and store the coreset in a run folder, if one is given; return the phase's record."""
    split = samples.data.train
    scorers = [SentModel.of(m.architecture, split, load_tensors(m.storage, m.file), m.precision) for m in models]
    record = load_record(models[0].storage, models[0].file, split.y)
    picked = select_coreset(shards, scorers, select, record, samples.train_indices, seed=settings.seed)
    if storage:
        facts = select.model_dump(include={*Select.model_fields, "model_from"})
        save_coreset(storage, picked.coreset, samples, settings, facts, picked.indices, picked.scores)
    return {"costs": [picked.cost.record()], "size": len(picked.coreset)}

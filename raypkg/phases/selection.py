"""Selecting the coreset with the pre-trained model's gradients, on the actors that hold the data."""

from typing import Any

from raypkg.cluster.actors import hold
from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.settings import Model, RunSettings, Select
from raypkg.coresets.sharded import SentModel, select_coreset
from raypkg.data.coreset import Coreset
from raypkg.engine.shards import Shard, class_shards
from raypkg.runs.checkpoints import load_model
from raypkg.runs.folder import RunFolder, locate
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .coreset_files import FILE, load_coreset, load_record, origin, save_coreset, save_scores
from .samples import Samples
from .training import MODEL


def trained_model(experiment: RunSettings, folder: RunFolder, run: str) -> tuple[Model, tuple[Storage, str]]:
    """Return settings and file of the model that another run trained.

    Args:
        experiment: this run's data set and seed.
        folder: of this run, among whose neighbours the other is looked for by name.
        run: its name or path.

    Raises:
        UserError: no such run, it trained no model, or its training samples were others than those of this run.
    """
    if not run:
        raise UserError("select needs a model: give --model-from RUN")
    found = locate(folder.storage.root.rsplit("/", 2)[0], run)
    stored = found.config
    if "model" not in stored or MODEL not in found.storage.list():
        raise UserError(f"run {found.name} has no {MODEL}: it trained no model, or is not finished")
    theirs = load_settings(RunSettings, {name: stored[name] for name in ("seed", "dataset") if name in stored})
    for name, here in origin(experiment).items():
        if origin(theirs)[name] != here:
            raise UserError(f"run {found.name} has {name} {origin(theirs)[name]}, here it is {here}: give the same")
    return load_settings(Model, stored["model"]), (found.storage, MODEL)


def select_on_cluster(
    experiment: RunSettings,
    architecture: Model,
    select: Select,
    found: Samples,
    report: Report,
    *,
    weights: tuple[Storage, str],
    precision: str,
) -> Coreset:
    """Select a coreset and keep it in the run folder, unless it is there already.

    Args:
        experiment: data set, cluster and seed.
        architecture: of the model whose gradients select.
        select: method and fraction.
        found: the samples to select from.
        report: progress and run folder.
        weights: run folder and file of that model.
        precision: of the forward passes.
    """
    storage = report.folder.storage
    split = found.data.train

    def work() -> dict[str, Any]:
        parameters = {name: value.numpy() for name, value in load_model(*weights).items()}
        scorer = SentModel(architecture, split.shape, split.num_classes, parameters, precision)
        record = load_record(*weights, split.y)

        def split_by_class(holders: int) -> list[Shard]:
            return class_shards(experiment.dataset, split.y, found.kept, found.valid, holders)

        with hold(split_by_class, experiment.cluster) as shards:
            picked = select_coreset(shards, scorer, select, record, found.kept, seed=experiment.seed)
        facts = {**origin(experiment), **select.model_dump(include={*Select.model_fields, "model_from"})}
        scores = save_scores(storage, split, picked.indices, picked.scores)
        save_coreset(storage, picked.coreset, split, facts, scores)
        return {"costs": [picked.cost.record()], "size": len(picked.coreset)}

    report.phase("select", work, epochs=0)
    return load_coreset(f"{storage.root}/{FILE}", split, found.valid, experiment.dataset.name)

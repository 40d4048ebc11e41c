"""Selecting the coreset with the pre-trained model's gradients, on the actors that hold the data."""

from typing import Any

import torch

from raypkg.cluster.shards import hold
from raypkg.core.settings import Experiment, Select
from raypkg.engine.selection import Scorer, select_coreset
from raypkg.engine.shards import Shard, class_shards
from raypkg.methods.coreset import Coreset
from raypkg.runs.checkpoints import load_model
from raypkg.runs.report import Report

from .coresets import FILE, load_coreset, save_coreset, save_scores
from .samples import Samples


def select_on_cluster(
    experiment: Experiment, select: Select, found: Samples, report: Report, *, model: str, precision: str
) -> Coreset:
    """Select a coreset and keep it in the run folder, unless it is there already.

    Args:
        experiment: data set, model, cluster and seed.
        select: method and fraction.
        found: the samples to select from.
        report: progress and run folder.
        model: file of the run folder with the weights whose gradients select.
        precision: of the forward passes.
    """
    storage = report.folder.storage
    split = found.data.train

    def work() -> dict[str, Any]:
        weights = load_model(storage, model)
        scorer = Scorer(experiment.model, {name: w.numpy() for name, w in weights.items()}, precision, experiment.seed)

        def split_by_class(holders: int) -> list[Shard]:
            return class_shards(experiment.dataset, split.y, found.kept, found.valid, holders)

        with hold(split_by_class, experiment.cluster) as shards:
            picked = select_coreset(shards, scorer, select, split.y, found.kept, seed=experiment.seed)
        save_scores(storage, picked.indices, picked.scores)
        scores = torch.zeros(len(split)).index_put((picked.indices,), picked.scores)
        save_coreset(storage, picked.coreset, split, {"seed": experiment.seed, **select.model_dump()}, scores)
        return {"costs": [picked.cost.record()], "size": len(picked.coreset)}

    report.phase("select", work, epochs=0)
    return load_coreset(f"{storage.root}/{FILE}", split, held_out=found.valid)

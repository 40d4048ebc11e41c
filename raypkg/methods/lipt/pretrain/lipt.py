"""LiPT, reconstructed: sparse models train on disjoint shards without communication, and are merged once.

    split the samples into k disjoint, class-stratified shards
    for model i of k, in parallel:
        mask_i = random mask with layer-wise densities from the saliency of the initial weights w0 on shard i
        w_i    = w0 ⊙ mask_i trained on shard i
    w = Σ_i mask_i ⊙ w_i / Σ_i mask_i; w0 where no mask has a weight

Batch-norm statistics of w are then estimated by forward passes. The paper prints no pseudo-code that we know of: this
follows its abstract and the released settings.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from raypkg.cluster.workers import Workers
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.record import Record
from raypkg.data.partition import stratified_shards
from raypkg.engine.costs import Cost
from raypkg.engine.worker import Worker
from raypkg.methods.lipt.merges import merge
from raypkg.methods.lipt.settings import LiptSettings
from raypkg.phases.coreset_files import save_record
from raypkg.phases.samples import Samples, open_samples
from raypkg.phases.training import measure_held_out
from raypkg.runs.checkpoints import save_tensors
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from . import RESULT, pretraining
from .member import Context, parameters_of, train_member
from .merging import estimate_statistics, merged_parameters


@pretraining("lipt", source="PMLR 202:29130, reconstructed")
def pretrain_lipt(settings: LiptSettings, report: Report, *, samples: Samples, workers: Workers) -> None:
    """Train sparse models on disjoint shards without communication, then merge them once.

    Raises:
        UserError: the merge needs held-out samples, of which there are none.
    """
    pretrain = settings.pretrain
    if "score" in merge[pretrain.merge].declares and not len(samples.valid):
        raise UserError(f"pretrain.merge = {pretrain.merge!r} needs held-out samples: set dataset.validation above 0")
    storage = report.folder.storage

    def work() -> dict[str, Any]:
        return workers.run(pretrain_models, settings, storage)

    report.phase("pretrain", work, epochs=pretrain.models * pretrain.epochs, models=pretrain.models)


def pretrain_models(worker: Worker, settings: LiptSettings, storage: Storage) -> dict[str, Any]:
    """Train models r, r + W, … on worker r of W, merge those of all workers, and save the merged model."""
    context = Context(settings, storage, open_samples(settings), worker)
    shards = disjoint_shards(context)  # every worker draws the same
    numbers = range(worker.rank, settings.pretrain.models, worker.world)
    trained = [train_member(context, number, shards[number]) for number in numbers]
    worker.sum(torch.zeros(1, device=worker.device))  # wait here, so that the merge's seconds are its own
    with Cost("merge") as merging:
        model = context.model()
        members = [each.member for each in trained]
        merged = merged_parameters(context, parameters_of(model), members, merging)
        model.load_state_dict(merged, strict=False)
        if worker.rank == 0:  # the others' model is not used
            merging.forward += estimate_statistics(context, model)
            save_tensors(storage, RESULT, model.state_dict())
    keep_record(context, [each.record for each in trained])
    evaluating = Cost("evaluate")
    held_out = {}
    if worker.rank == 0:
        held_out = measure_held_out(model, context.samples, context.alone, settings.pretrain, evaluating)
    return {**held_out, **figures(worker, [each.cost for each in trained], merging, evaluating)}


def disjoint_shards(context: Context) -> list[Tensor]:
    """Return the models' disjoint, class-stratified shards.

    Raises:
        UserError: more models than samples, shards that overlap, or a shard without samples of some class.
    """
    samples = context.samples
    pretrain = context.settings.pretrain
    size = pretrain.shard_size(len(samples.kept))
    rng = generator(context.settings.seed, "shards")
    return stratified_shards(samples.data.train.y, pretrain.models, size, rng, indices=samples.kept)


def keep_record(context: Context, records: Sequence[Record]) -> None:
    """Save what the models of all workers saw of their samples."""
    everyone = chain.from_iterable(context.worker.gather(records))
    record = Record.joined(list(everyone))
    if context.worker.rank == 0:
        save_record(context.storage, RESULT, record)


def figures(worker: Worker, costs: Sequence[Cost], merging: Cost, evaluating: Cost) -> dict[str, Any]:
    """Return the bills over all workers, and how long one worker per model would take."""
    training = Cost("pretrain")
    for cost in costs:
        training = training.then(cost)
    seconds = list(chain.from_iterable(worker.gather([cost.seconds for cost in costs])))
    slowest = max(seconds)  # the critical path, with as many workers as models
    merge_seconds = max(worker.gather(merging.seconds))
    finding = (
        f"LiPT (reconstructed) with one worker per model pre-trains in {slowest + merge_seconds:.1f} s (slowest of"
        f" {len(seconds)} models {slowest:.1f} s + merge {merge_seconds:.1f} s)"
    )
    bills = [training.then(merging), evaluating]
    return {
        "costs": [bill.gathered(worker).record() for bill in bills],
        "models": len(seconds),
        "slowest_model_seconds": slowest,
        "merge_seconds": merge_seconds,
        "workers": worker.world,
        "findings": [finding],
    }

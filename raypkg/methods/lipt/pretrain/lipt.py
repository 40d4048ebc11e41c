"""LiPT, reconstructed: models train on disjoint shards without communication, and are merged.

    split the samples into k disjoint, class-stratified shards
    for model i of k, in parallel:
        mask_i = random mask with layer-wise densities from the saliency of the initial weights w0 on shard i
    w = w0
    in each of R rounds, 1/R of the epochs:
        for model i of k, in parallel:
            w_i = w ⊙ mask_i trained on shard i
        w' = Σ_i mask_i ⊙ w_i / Σ_i mask_i; w where no mask has a weight
        w  = w', or a step of momentum ahead of it
    batch-norm statistics of w are estimated by forward passes
    some epochs of plain distributed training on all samples, where they are asked for

The paper prints no pseudo-code that we know of: R = 1, without outer momentum and joint epochs, follows its abstract
and the released settings. More rounds are ours: local SGD.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raypkg.cluster.workers import Workers
from raypkg.core.config import Named
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.data.partition import stratified_shards
from raypkg.data.split import at_hand
from raypkg.engine.costs import Cost
from raypkg.engine.worker import Worker
from raypkg.experiments.samples import Samples, samples_on
from raypkg.experiments.training import Job, measure_held_out, train_on_cluster
from raypkg.methods.lipt.merges import merge
from raypkg.methods.lipt.settings import LiptSettings
from raypkg.runs.checkpoints import save_tensors
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from . import MERGED_FILE, RESULT, pretraining
from .member import Context, Trained, prepared, train_member
from .merging import estimate_statistics
from .rounds import Merged, keep_round, merge_round, restored
from .seen import CONTINUED, keep_seen


@pretraining("lipt", source="PMLR 202:29130, reconstructed")
def pretrain_lipt(settings: LiptSettings, report: Report, *, samples: Samples, workers: Workers) -> None:
    """Train models on disjoint shards without communication, and merge them, once or once a round.

    Raises:
        UserError: the merge needs held-out samples, of which there are none.
    """
    pretrain = settings.pretrain
    if "score" in merge[pretrain.merge].declares and not len(samples.held_out):
        raise UserError(f"pretrain.merge = {pretrain.merge!r} needs held-out samples: set dataset.validation above 0")
    storage = report.folder.storage

    def work() -> dict[str, Any]:
        return workers.run(pretrain_models, settings, storage)

    report.phase("pretrain", work, epochs=pretrain.models * pretrain.epochs, models=pretrain.models)
    if pretrain.joint_epochs:
        job = Job(
            settings,
            pretrain.joint,
            storage,
            phase="joint",
            hooks=(Named(name=CONTINUED),),
            initial=MERGED_FILE,
            result=RESULT,
            main=False,
        )
        train_on_cluster(job, samples, report, workers)


def pretrain_models(worker: Worker, settings: LiptSettings, storage: Storage) -> dict[str, Any]:
    """Train models r, r + W, … on worker r of W, merge those of all workers round by round, and save the last merge."""
    context = Context(settings, storage, samples_on(worker, settings), worker)
    shards = disjoint_shards(context)  # every worker draws the same
    numbers = range(worker.rank, settings.pretrain.models, worker.world)
    own = torch.cat([shards[0][:0], *(shards[number] for number in numbers)])  # none where workers outnumber models
    split = at_hand(context.samples.data.train, own)
    trainees = [prepared(context, number, shards[number], split) for number in numbers]
    merged = restored(context)
    trained: list[Trained] = []
    for last in settings.pretrain.merge_epochs:
        if last <= merged.epoch:
            continue  # done before a restart
        stage = merged.until(last)
        trained = [train_member(trainee, stage) for trainee in trainees]
        merged = merge_round(context, stage, merged, trained)
        if last < settings.pretrain.epochs:
            keep_round(context, merged)
    return concluded(context, merged, trained)


def concluded(context: Context, merged: Merged, trained: Sequence[Trained]) -> dict[str, Any]:
    """Save the merged model and what all models saw of their samples; return the phase's record."""
    worker = context.worker
    pretrain = context.settings.pretrain
    model = context.model()
    model.load_state_dict(merged.parameters, strict=False)
    with Cost("merge") as statistics:
        if worker.rank == 0:  # the others' model is not used
            statistics.forward += estimate_statistics(context, model)
            save_tensors(context.storage, MERGED_FILE if pretrain.joint_epochs else RESULT, model.state_dict())
    merged = replace(merged, merging=merged.merging.then(statistics.gathered(worker)))
    keep_seen(context, disjoint_shards(context), trained)
    evaluating = Cost("evaluate")
    held_out = {}
    if worker.rank == 0:
        held_out = measure_held_out(model, context.samples, context.alone, pretrain, evaluating)
    return {**held_out, **figures(context, merged, [each.cost for each in trained], evaluating)}


def disjoint_shards(context: Context) -> list[Tensor]:
    """Return the models' disjoint, class-stratified shards.

    Raises:
        UserError: more models than samples, shards that overlap, or a shard without samples of some class.
    """
    samples = context.samples
    pretrain = context.settings.pretrain
    size = pretrain.shard_size(len(samples.train_indices))
    rng = generator(context.settings.seed, "shards")
    return stratified_shards(samples.data.train.y, pretrain.models, size, rng, indices=samples.train_indices)


def figures(context: Context, merged: Merged, costs: Sequence[Cost], evaluating: Cost) -> dict[str, Any]:
    """Return the bills over all workers, and how long one worker per model would take."""
    worker = context.worker
    training = Cost("pretrain")
    for cost in costs:
        training = training.then(cost)
    merging = merged.merging
    models = len(merged.trained)
    merges = len(context.settings.pretrain.merge_epochs)
    rounds = f" in each of {merges} rounds" if merges > 1 else ""
    finding = (
        f"LiPT (reconstructed) with one worker per model pre-trains in {merged.slowest + merging.seconds:.1f} s"
        f" (slowest of {models} models{rounds} {merged.slowest:.1f} s + merge {merging.seconds:.1f} s)"
    )
    n = len(context.samples.train_indices)
    return {
        "costs": [training.gathered(worker).then(merging).record(), evaluating.gathered(worker).record()],
        "models": models,
        "merges": merges,
        "slowest_model_seconds": merged.slowest,  # the critical path, with as many workers as models
        "critical_samples": context.settings.pretrain.critical_samples(n),
        "merge_seconds": merging.seconds,
        "workers": worker.world,
        "findings": [finding],
    }

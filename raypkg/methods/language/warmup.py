"""The warm-up of the adapters: one training on all workers, or LiPT's models of disjoint shards, merged once."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raypkg.cluster.workers import Workers
from raypkg.core.config import Named
from raypkg.core.seeds import derive, generator
from raypkg.data.coreset import Coreset
from raypkg.data.split import at_hand
from raypkg.engine.costs import Cost
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.engine.worker import Worker
from raypkg.experiments.samples import Samples, new_model, samples_on
from raypkg.experiments.training import Job, train_on_cluster
from raypkg.methods.lipt.merges import Member, masked_average
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .hook import Checkpoint, KeepCheckpoints, Rates, save_checkpoint
from .less import Moments
from .settings import InstructSettings

PHASE = "warmup"
RESULT = "warmup.safetensors"


def warm_up(settings: InstructSettings, samples: Samples, report: Report, workers: Workers) -> None:
    """Carry out the phase, which leaves its checkpoints in the run folder."""
    storage = report.folder.storage
    chosen = settings.warmup
    if chosen.by == "lipt":
        work = partial(workers.run, warm_up_on_shards, settings, storage)
        report.phase(PHASE, work, epochs=chosen.models * chosen.epochs, models=chosen.models)
        return
    hooks = (Named(name=f"{KeepCheckpoints.__module__}:{KeepCheckpoints.__name__}"),)
    coreset = Coreset.uniform(warmup_samples(settings, samples))
    job = Job(settings, chosen, storage, phase=PHASE, hooks=hooks, coreset=coreset, result=RESULT)
    train_on_cluster(job, samples, report, workers)


def warmup_samples(settings: InstructSettings, samples: Samples) -> Tensor:
    """Return the positions of a random share of the pool, int64 [m] ascending."""
    pool = samples.train_indices
    order = torch.randperm(len(pool), generator=generator(settings.seed, PHASE))
    return pool[order[: settings.warmup_size(len(pool))]].sort().values


def warm_up_on_shards(worker: Worker, settings: InstructSettings, storage: Storage) -> dict[str, Any]:
    """Train models r, r + W, … on worker r of W, each on its own shard, and average weights and moments of all.

    This is LiPT's merge (PMLR 202:29130) without masks. The average of the moments is ours: LESS has one model.
    """
    chosen = settings.warmup
    samples = samples_on(worker, settings)
    drawn = warmup_samples(settings, samples)
    order = torch.randperm(len(drawn), generator=generator(settings.seed, "shards"))
    shards = drawn[order].tensor_split(chosen.models)
    members = []
    cost = Cost(PHASE)
    for number in range(worker.rank, chosen.models, worker.world):
        rates = Rates()
        run = Run(
            model=new_model(settings, samples.data),
            split=at_hand(samples.data.train, shards[number]),
            coreset=Coreset.uniform(shards[number]),
            settings=chosen,
            seed=derive(settings.seed, "lipt", number),
            phase=PHASE,
            worker=replace(worker, rank=0, world=1),  # models exchange no gradients
            augment=(),
            cost=Cost(PHASE),
            hooks=[rates],
            label=number,
            main=False,
        )
        fit(run, checkpoints=StoredCheckpoints(storage / "checkpoints" / PHASE / f"model_{number:03d}", keep=1))
        members.append(Member(_flat(Checkpoint.of(run, chosen.lr)), {}))
        cost = cost.then(run.bills()[0])

    trained = {name: w for name, w in new_model(settings, samples.data).named_parameters() if w.requires_grad}
    initial = {f"{kind}.{name}": w for kind in ("w", "m", "v") for name, w in trained.items()}
    with Cost(PHASE) as merging:
        merged = masked_average(initial, members, worker.sum)
        if worker.world > 1:
            merging.sent += 2 * 8 * sum(w.numel() for w in initial.values())
    if worker.rank == 0:
        weights = {name: merged[f"w.{name}"].detach() for name in trained}
        moments = {name: Moments(*(merged[f"{kind}.{name}"].detach() for kind in ("m", "v"))) for name in trained}
        save_checkpoint(storage, 0, Checkpoint(chosen.lr, weights, moments))
    slowest = max(worker.gather(cost.seconds))
    finding = f"warm-up by LiPT (ours, not LESS's): {chosen.models} models of disjoint shards, merged once"
    costs = [cost.gathered(worker).then(merging.gathered(worker)).record()]
    return {"costs": costs, "models": chosen.models, "slowest_worker_seconds": slowest, "findings": [finding]}


def _flat(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return weights and moments under names of their own."""
    flat = {f"w.{name}": w for name, w in checkpoint.weights.items()}
    for name, pair in checkpoint.moments.items():
        flat |= {f"m.{name}": pair.m, f"v.{name}": pair.v}
    return flat

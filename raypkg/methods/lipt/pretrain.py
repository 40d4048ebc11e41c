"""Pre-training of the model whose gradients select: LiPT, one dense model, or none."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from raypkg.cluster.launch import launch
from raypkg.core.errors import UserError
from raypkg.core.seeds import derive, generator, seeded
from raypkg.core.settings import Experiment
from raypkg.coresets.record import Record
from raypkg.coresets.recorder import Recorder
from raypkg.data.coreset import Coreset
from raypkg.data.partition import stratified_shards
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.costs import Cost
from raypkg.engine.loop import autocast, evaluate, fit
from raypkg.engine.run import Run
from raypkg.engine.worker import Worker
from raypkg.methods.sparse.masked import Masked
from raypkg.methods.sparse.masks import Densities, Masks, erk, prunable, random_masks
from raypkg.phases.coreset_files import save_record
from raypkg.phases.samples import Samples, augmentations, new_model, open_samples
from raypkg.phases.training import Job, measure_held_out, train_on_cluster
from raypkg.runs.checkpoints import StoredCheckpoints, save_tensors
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .batchnorm import reestimate
from .densities import snip_ratios
from .settings import Pretrain
from .soup import Soup, greedy

RESULT = "pretrained.safetensors"
STATISTICS_SAMPLES = 2048  # enough for the batch-norm statistics of the merged model

State = dict[str, Tensor]  # parameters by name
Members = list[tuple[State, Masks]]


@dataclass(frozen=True)
class LiptJob:
    """What every LiPT worker is told."""

    experiment: Experiment
    pretrain: Pretrain
    storage: Storage

    def checkpoints(self, model: int) -> StoredCheckpoints:
        """Where model ``model`` keeps its epochs, and so what a restarted worker finds done."""
        return StoredCheckpoints(self.storage / "checkpoints" / "pretrain" / f"model_{model:03d}", keep=1)


def pretrain_lipt(experiment: Experiment, pretrain: Pretrain, report: Report) -> dict[str, Any]:
    """Train ``models`` sparse models on disjoint shards without communication, then merge them once.

    Model i trains on shard i from the common initial weights, under a random mask with layer-wise SNIP ratios. Which
    worker trains it makes no difference to it. Reconstructed from the abstract of PMLR 202:29130.
    """
    job = LiptJob(experiment, pretrain, report.folder.storage)
    return report.phase(
        "pretrain",
        lambda: launch(
            pretrain_models,
            job,
            cluster=experiment.cluster,
            report=report,
            folder=job.storage.root + "/ray",
            most=pretrain.models,
        ),
        epochs=pretrain.models * pretrain.epochs,
    )


def pretrain_models(worker: Worker, job: LiptJob) -> dict[str, Any]:
    """Train models r, r + W, … on worker r of W, merge all with one all-reduce, and save the merged model."""
    found = open_samples(job.experiment)
    if job.pretrain.merge == "greedy" and not len(found.valid):
        raise UserError("pretrain.merge = 'greedy' needs held-out samples: set dataset.validation above 0")
    initial = parameters(new_model(job.experiment, found.data))
    shards, cost, members, records, seconds = lipt_shards(found, job), Cost("pretrain"), [], [], []
    for number in range(worker.rank, job.pretrain.models, worker.world):
        run, masks, record = train_member(worker, job, found, shards[number], number)
        members.append((parameters(run.model), masks))
        records.append(record)
        bill, *_ = run.bills()
        seconds.append(bill.seconds)
        cost = cost.then(bill)
    worker.sum(torch.zeros(1, device=worker.device))  # wait here, so that the merge's seconds are its own
    model = new_model(job.experiment, found.data).to(worker.device)
    with Cost("merge") as merge:
        merged = MERGES[job.pretrain.merge](worker, job, found, initial, members, merge)
        model.load_state_dict(merged, strict=False)
        if worker.rank == 0:
            merge.forward += estimate_statistics(model, worker, job, found)
            save_tensors(job.storage, RESULT, model.state_dict())
    seen = Record.joined([record for part in worker.gather(records) for record in part])
    if worker.rank == 0:
        save_record(job.storage, RESULT, seen)
    measuring, alone = Cost("evaluate"), replace(worker, world=1)
    held_out = measure_held_out(model, found, alone, job.pretrain, measuring) if worker.rank == 0 else {}
    each = [second for part in worker.gather(seconds) for second in part]
    slowest, merging = max(each), max(worker.gather(merge.seconds))
    finding = (
        f"LiPT (reconstructed) with one worker per model pre-trains in {slowest + merging:.1f} s (slowest of"
        f" {job.pretrain.models} models {slowest:.1f} s + merge {merging:.1f} s)"
    )
    return {
        "costs": [bill.gathered(worker).record() for bill in (cost.then(merge), measuring)],
        **held_out,
        "models": job.pretrain.models,
        "slowest_model_seconds": slowest,
        "merge_seconds": merging,
        "workers": worker.world,
        "findings": [finding],
    }


def train_member(worker: Worker, job: LiptJob, found: Samples, shard: Tensor, number: int) -> tuple[Run, Masks, Record]:
    """Train model ``number`` from the common initial weights under its own mask, on its shard, by itself."""
    alone = replace(worker, rank=0, world=1)
    settings, seed = job.pretrain, derive(job.experiment.seed, "lipt", number)
    cost = Cost("pretrain")
    with cost:
        model = new_model(job.experiment, found.data).to(worker.device)
        weights = prunable(model)
        shapes = {name: w.shape for name, w in weights.items()}
        batch = shard[torch.randperm(len(shard), generator=generator(seed, "snip"))[: settings.batch_size]]
        densities = DENSITIES[settings.sparsity](model, found, batch, settings, worker, cost)
        masks = random_masks(shapes, densities, generator(seed, "mask")) if densities else {}
    recorder = Recorder(found.data.train.y)
    extra = ["randaugment"] if settings.randaugment and len(found.data.train.shape) == 3 else []
    run = Run(
        model=model,
        split=found.data.train,
        coreset=Coreset.uniform(shard),
        settings=settings,
        seed=seed,
        phase="pretrain",
        worker=alone,
        augment=[*augmentations(job.experiment.dataset, found.data), *extra],
        cost=cost,
        hooks=[recorder, *([Masked(masks)] if masks else [])],
        label=number,
        main=False,
    )
    return fit(run, checkpoints=job.checkpoints(number)), masks, recorder.record


def snip_densities(
    model: nn.Module, found: Samples, batch: Tensor, settings: Pretrain, worker: Worker, cost: Cost
) -> Densities:
    """Return layer-wise densities from the saliency of one batch of the shard."""
    x, y = next(plain_batches(found.data.train, batch, worker.device, len(batch), dtype_of(model)))
    cost.forward += len(batch)
    cost.backward += len(batch)
    with autocast(settings.precision, worker.device), seeded(0, "snip dropout"):
        return snip_ratios(model, x, y, settings.density)


def erk_densities(
    model: nn.Module, found: Samples, batch: Tensor, settings: Pretrain, worker: Worker, cost: Cost
) -> Densities:
    """Return Erdős–Rényi-kernel densities, which look at no data."""
    return erk({name: w.shape for name, w in prunable(model).items()}, settings.density)


def no_densities(*_: Any) -> Densities:
    """Return none: the models are dense."""
    return {}


DENSITIES = {"snip": snip_densities, "erk": erk_densities, "none": no_densities}


def merge_masked(worker: Worker, job: LiptJob, found: Samples, initial: State, members: Members, cost: Cost) -> State:
    """Average each weight over the models whose mask has it; one all-reduce."""
    soup = Soup(initial)
    for state, masks in members:
        soup.add(state, masks)
    cost.sent += soup.sums.nbytes * (worker.world > 1)
    return soup.merged(worker.sum)


def merge_mean(worker: Worker, job: LiptJob, found: Samples, initial: State, members: Members, cost: Cost) -> State:
    """Average each weight over all models, pruned ones counting as zero; one all-reduce."""
    return merge_masked(worker, job, found, initial, [(state, {}) for state, _ in members], cost)


def merge_greedy(worker: Worker, job: LiptJob, found: Samples, initial: State, members: Members, cost: Cost) -> State:
    """Add models, best first, as long as held-out accuracy does not fall; every worker sends its models once."""
    model = new_model(job.experiment, found.data).to(worker.device)
    alone = replace(worker, rank=0, world=1)

    def score(state: State) -> float:
        model.load_state_dict(state, strict=False)
        cost.forward += estimate_statistics(model, worker, job, found)
        bill = Cost("evaluate")  # its seconds are the merge's already
        found_here = evaluate(model, found.data.train, found.valid, alone, bill, precision=job.pretrain.precision)
        cost.forward += bill.forward
        return found_here["accuracy"]

    parts = worker.gather(members)
    everyone = [parts[n % worker.world][n // worker.world] for n in range(job.pretrain.models)]
    cost.sent += sum(w.nbytes for state, masks in members for w in (*state.values(), *masks.values()))
    return greedy(initial, everyone, score)


MERGES = {"masked_mean": merge_masked, "mean": merge_mean, "greedy": merge_greedy}


def estimate_statistics(model: nn.Module, worker: Worker, job: LiptJob, found: Samples) -> int:
    """Re-estimate batch-norm statistics on a random part of the training samples; return how many."""
    order = torch.randperm(len(found.kept), generator=generator(job.experiment.seed, "statistics"))
    indices = found.kept[order[:STATISTICS_SAMPLES]]
    batches = plain_batches(found.data.train, indices, worker.device, min(256, len(indices)), dtype_of(model))
    with autocast(job.pretrain.precision, worker.device), seeded(job.experiment.seed, "statistics dropout"):
        return reestimate(model, (x for x, _ in batches))


def lipt_shards(found: Samples, job: LiptJob) -> list[Tensor]:
    """Return the models' disjoint, class-stratified shards.

    Raises:
        UserError: more models than samples, shards that overlap, or a shard without samples of some class.
    """
    models, fraction, n = job.pretrain.models, job.pretrain.shard_fraction, len(found.kept)
    if fraction and fraction * models > 1 + 1e-9:
        raise UserError(
            f"pretrain.shard_fraction = {fraction} for {models} disjoint shards: at most 1/{models} = {1 / models:.4g}"
        )
    size = int(n * (fraction or 1 / models) + 1e-9)
    rng = generator(job.experiment.seed, "shards")
    return stratified_shards(found.data.train.y, models, size, rng, indices=found.kept)


def pretrain_dense(experiment: Experiment, pretrain: Pretrain, report: Report) -> dict[str, Any]:
    """Train one dense model on all samples by DDP: the usual pre-training, for comparison."""
    job = Job(experiment, pretrain, report.folder.storage, "pretrain", result=RESULT, main=False)
    return train_on_cluster(job, report)


def keep_initial(experiment: Experiment, pretrain: Pretrain, report: Report) -> dict[str, Any]:
    """Take the initial weights: selection without pre-training, for comparison."""

    def work() -> dict[str, Any]:
        with Cost("pretrain") as cost:
            model = new_model(experiment, open_samples(experiment).data)
            save_tensors(report.folder.storage, RESULT, model.state_dict())
        return {"costs": [cost.record()], "workers": 1}

    return report.phase("pretrain", work, epochs=0)


PRETRAININGS = {"lipt": pretrain_lipt, "dense": pretrain_dense, "none": keep_initial}


def parameters(model: nn.Module) -> State:
    """Return copies of a model's parameters on the CPU, without its buffers."""
    return {name: w.detach().cpu().clone() for name, w in model.named_parameters()}

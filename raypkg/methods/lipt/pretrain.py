"""LiPT's pre-training, reconstructed, and two baselines: the model whose gradients select the coreset.

    split the samples into k disjoint, class-stratified shards
    for model i of k, in parallel:
        mask_i = random mask with layer-wise densities from the saliency of the initial weights w0 on shard i
    w = w0
    in each of R rounds, 1/R of the epochs:
        for model i of k, in parallel:
            w_i = w ⊙ mask_i trained on shard i
        w = Σ_i mask_i ⊙ w_i / Σ_i mask_i; w of before where no mask has a weight
    batch-norm statistics of w are estimated by forward passes
    optionally, some epochs of plain distributed training on all samples

The paper prints no pseudo-code that we know of: R = 1, without joint epochs, follows its abstract and the
released settings. More rounds are ours: local SGD.

    @pretraining(name)    pretrain(settings, report, *, samples, workers) → None

A pre-training carries out the report's phase "pretrain" and leaves the model's weights in the run folder as ``RESULT``,
with the record of training that some coreset rules need.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raypkg.cluster.workers import Workers
from raypkg.core.config import Named
from raypkg.core.errors import UserError
from raypkg.core.seeds import derive, generator, seeded
from raypkg.coresets.record import Recorder
from raypkg.data.coreset import Coreset
from raypkg.data.kinds import IMAGES
from raypkg.data.split import Split, at_hand, stratified_shards
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.loop import autocast, fit
from raypkg.engine.run import Hook, Run
from raypkg.engine.worker import Cost, Worker
from raypkg.experiments.samples import Samples, augmentations, new_model, samples_on
from raypkg.experiments.training import Job, measure_held_out, save_record, train_on_cluster
from raypkg.methods.sparse.hook import Masked, first_batch
from raypkg.methods.sparse.masks import Masks, random_masks
from raypkg.methods.sparse.training import first_masks
from raypkg.runs.checkpoints import StoredCheckpoints, load_state, save_state, save_tensors
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from . import merge, pretraining
from .merges import Member, State, reestimate
from .settings import RESULT, LiptSettings

MERGED = "merged"  # name of the merged model's checkpoints
MERGED_FILE = "checkpoints/merged.safetensors"  # of an unfinished run, if joint epochs follow the merge
SEEN = "checkpoints/seen.pt"  # the models' records, which joint epochs continue
CONTINUED = f"{__name__}:ContinuedRecord"  # name of the hook of joint epochs
STATISTICS_SAMPLES = 2048  # enough for the batch-norm statistics of a merged model


@pretraining("lipt", source="PMLR 202:29130, reconstructed")
def pretrain_lipt(settings: LiptSettings, report: Report, *, samples: Samples, workers: Workers) -> None:
    """Train models on disjoint shards without communication, and merge them, once or once a round."""
    pretrain = settings.pretrain
    storage = report.folder.storage
    work = partial(workers.run, pretrain_models, settings, storage)
    report.phase("pretrain", work, epochs=pretrain.models * pretrain.epochs, models=pretrain.models)
    if pretrain.joint_epochs:
        hooks = (Named(name=CONTINUED),)
        job = Job(settings, pretrain.joint, storage, phase="joint", hooks=hooks, initial=MERGED_FILE, result=RESULT)
        train_on_cluster(job, samples, report, workers)


@pretraining("dense")
def pretrain_dense(settings: LiptSettings, report: Report, *, samples: Samples, workers: Workers) -> None:
    """Train one dense model on all samples by DDP."""
    job = Job(settings, settings.pretrain, report.folder.storage, phase="pretrain", result=RESULT)
    train_on_cluster(job, samples, report, workers)


@pretraining("initial")
def keep_initial(settings: LiptSettings, report: Report, *, samples: Samples) -> None:
    """Select by the gradients of the initial weights."""

    def work() -> dict[str, Any]:
        with Cost("pretrain") as cost:
            model = new_model(settings, samples.data)
            save_tensors(report.folder.storage, RESULT, model.state_dict())
        return {"costs": [cost.record()], "workers": 1}

    report.phase("pretrain", work, epochs=0)


@dataclass(frozen=True)
class Context:
    """Settings, run folder and samples, which all workers share, and the worker itself."""

    settings: LiptSettings
    storage: Storage | None  # None = no run folder, hence no checkpoints
    samples: Samples
    worker: Worker
    given: nn.Module | None = None  # with the initial weights w0; None = the model of the settings

    @property
    def local(self) -> Worker:
        """The worker by itself, for work without collectives."""
        return replace(self.worker, rank=0, world=1)

    def model(self) -> nn.Module:
        """Build the model with the initial weights w0, the same on every worker."""
        model = new_model(self.settings, self.samples.data) if self.given is None else deepcopy(self.given)
        return model.to(self.worker.device)

    def checkpoints(self, name: str) -> StoredCheckpoints | None:
        """Return the place of the last checkpoint of a model or of the merged model."""
        if self.storage is None:
            return None
        return StoredCheckpoints(self.storage / "checkpoints" / "pretrain" / name, keep=1)


# One of the models


class Trainee(Hook):
    """One of the models, which stays in the memory of its worker from round to round.

    The result does not depend on the worker that trains it. The shard is the model's training indices, int64; the split
    is the training split, or a part that holds the shard's samples. As a hook of its run, it sets the weights of a
    round's start, unless the model's checkpoint is of later epochs.
    """

    priority = 0
    start: State  # of the round: these three are set before each
    first: int  # epochs done before
    last: int  # the epoch after which the models are merged

    def __init__(self, context: Context, number: int, shard: Tensor, split: Split):
        settings = context.settings.pretrain
        data = context.samples.data
        augment = augmentations(context.settings.dataset, data)
        if settings.randaugment and data.train.kind is IMAGES:
            augment.append("randaugment")
        seed = derive(context.settings.seed, "lipt", number)
        self.cost = Cost("pretrain")
        with self.cost:  # drawing the masks belongs to its training
            model = context.model()
            self.masks: Masks = {}  # none for a dense model
            if settings.sparsity is not None:
                order = torch.randperm(len(shard), generator=generator(seed, "snip"))
                drawn = shard[order[: settings.batch_size]]
                rng = generator(seed, "densities")
                scored = context.model()
                # Saliency is computed in the precision of training; dropout draws the same for every model.
                with autocast(settings.precision, context.worker.device), seeded(0, "snip dropout"):
                    batch = first_batch(settings.sparsity, scored, split, drawn, self.cost)
                    chosen = first_masks(settings.sparsity, scored, settings.density, rng=rng, batch=batch)
                # Only the densities are kept: positions drawn at random make the models differ.
                self.masks = redrawn(chosen, generator(seed, "mask"))
        self.shard = shard
        self.name = f"model_{number:03d}"
        self.checkpoints = context.checkpoints(self.name)
        self.recorder = Recorder(data.train.y)
        self.run = Run(
            model=model,
            split=split,
            coreset=Coreset.uniform(shard),
            settings=settings,
            seed=seed,
            phase="pretrain",
            worker=context.local,  # models exchange no gradients
            augment=augment,
            cost=self.cost,
            hooks=[self, self.recorder, Masked(self.masks)],
            label=number,
            main=False,
        )

    def train(self, start: State, first: int, last: int) -> None:
        """Train through a round, under its own masks and on its own shard, from the last checkpoint if there is one."""
        self.start, self.first, self.last = start, first, last
        self.run.last = last
        fit(self.run, checkpoints=self.checkpoints)
        self._check()
        self.run.optimizer.state.clear()  # the next round begins without it, and it is as large as the model
        self.cost, *_ = self.run.bills()  # of all rounds and all attempts

    def on_epoch(self, run: Run) -> None:
        """Replace the weights before the round's first epoch, and reset the optimiser."""
        self._check()
        if run.epoch == self.first:
            weights = {name: w * self.masks.get(name, 1) for name, w in self.start.items()}
            run.model.load_state_dict(weights, strict=False)  # batch-norm statistics, unused in training, stay
            run.optimizer.state.clear()

    def _check(self) -> None:
        """Refuse a checkpoint of another round: an unreadable file hides later epochs, and would change the result."""
        if not self.first <= self.run.epoch <= self.last:
            raise UserError(
                f"checkpoints/pretrain is damaged: {self.name} has done {self.run.epoch} epochs, the models were merged"
                f" after {self.first}: run it again under another name"
            )


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters on the CPU, without its buffers."""
    return {name: w.detach().cpu().clone() for name, w in model.named_parameters()}


def redrawn(masks: Masks, rng: torch.Generator) -> Masks:
    """Draw random masks with the layer-wise densities of others."""
    shapes = {name: mask.shape for name, mask in masks.items()}
    densities = {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()}
    return random_masks(shapes, densities, rng)


# Rounds


class Merged(NamedTuple):
    """The models after a merge, when all of them are equal, or before the first."""

    parameters: State
    epoch: int  # epochs done by all models
    trained: Sequence[float]  # training seconds of each model so far
    slowest: float  # seconds of the slowest model, summed over the rounds
    merging: Cost  # of the merges, over all workers


def train_and_merge(context: Context) -> tuple[nn.Module, Merged, list[Trainee], list[Tensor]]:
    """Train models r, r + W, … on worker r of W, and merge those of all workers round by round.

    Return the merged model, with batch-norm statistics on rank 0, its record, this worker's models and all shards.
    """
    pretrain = context.settings.pretrain
    worker = context.worker
    train = context.samples.data.train
    # Disjoint, class-stratified shards, each with samples of every class; every worker draws the same.
    train_indices, rng = context.samples.train_indices, generator(context.settings.seed, "shards")
    size = pretrain.shard_size(len(train_indices))
    shards = stratified_shards(train.y, pretrain.models, size, rng, indices=train_indices)
    numbers = range(worker.rank, pretrain.models, worker.world)
    own = torch.cat([shards[0][:0], *(shards[number] for number in numbers)])  # none if workers outnumber models
    split = at_hand(train, own)
    trainees = [Trainee(context, number, shards[number], split) for number in numbers]

    # Rounds, from the last merge of an interrupted run. One worker reads it for all, because workers of a lost attempt
    # may write another checkpoint while others read.
    checkpoints = context.checkpoints(MERGED) if worker.rank == 0 else None
    state = worker.first(checkpoints.load() if checkpoints else None)
    if state is None:
        merged = Merged(parameters_of(context.model()), 0, [], 0.0, Cost("merge"))
    else:
        merged = Merged(*(state[name] for name in Merged._fields))._replace(merging=Cost(**state["merging"]))
    for last in pretrain.merge_epochs:
        if last <= merged.epoch:
            continue  # done before a restart
        for trainee in trainees:
            trainee.train(merged.parameters, merged.epoch, last)
        merged = merge_round(context, merged, last, trainees)
        if last < pretrain.epochs:
            if checkpoints:
                checkpoints.save(last, {**merged._asdict(), "merging": merged.merging.record()})
            _wait(worker)  # no worker begins the next round before its start is stored

    model = context.model()
    model.load_state_dict(merged.parameters, strict=False)
    with Cost("merge") as statistics:
        if worker.rank == 0:  # the others' models are not used
            order = torch.randperm(len(train_indices), generator=generator(context.settings.seed, "statistics"))
            indices = train_indices[order[:STATISTICS_SAMPLES]]
            size = min(256, len(indices))
            batches = plain_batches(at_hand(train, indices), indices, worker.device, size, dtype_of(model))
            with autocast(pretrain.precision, worker.device), seeded(context.settings.seed, "statistics dropout"):
                statistics.forward += reestimate(model, (x for x, _ in batches))
    merging = merged.merging.then(statistics.gathered(worker))
    return model, merged._replace(merging=merging), trainees, shards


def pretrain_models(worker: Worker, settings: LiptSettings, storage: Storage) -> dict[str, Any]:
    """Pre-train on a run's workers, save the merged model, and return the phase's record."""
    pretrain = settings.pretrain
    context = Context(settings, storage, samples_on(worker, settings), worker)
    model, merged, trainees, shards = train_and_merge(context)
    merging = merged.merging
    keep_seen(context, storage, shards, trainees)
    evaluating = Cost("evaluate")
    held_out = {}
    if worker.rank == 0:
        save_tensors(storage, MERGED_FILE if pretrain.joint_epochs else RESULT, model.state_dict())
        held_out = measure_held_out(model, context.samples, context.local, evaluating, precision=pretrain.precision)

    # The costs over all workers, and the time with one worker per model.
    training = Cost("pretrain")
    for trainee in trainees:
        training = training.then(trainee.cost)
    merges = len(pretrain.merge_epochs)
    rounds = f" in each of {merges} rounds" if merges > 1 else ""
    finding = (
        f"LiPT (reconstructed) with one worker per model pre-trains in {merged.slowest + merging.seconds:.1f} s"
        f" (slowest of {pretrain.models} models{rounds} {merged.slowest:.1f} s + merge {merging.seconds:.1f} s)"
    )
    return {
        **held_out,
        "costs": [training.gathered(worker).then(merging).record(), evaluating.gathered(worker).record()],
        "models": pretrain.models,
        "merges": merges,
        "slowest_model_seconds": merged.slowest,  # the critical path with as many workers as models
        "critical_samples": pretrain.critical_samples(len(context.samples.train_indices)),
        "merge_seconds": merging.seconds,
        "workers": worker.world,
        "findings": [finding],
    }


def merge_round(context: Context, before: Merged, last: int, trainees: Sequence[Trainee]) -> Merged:
    """Merge the models of all workers after a round, which ends with epoch ``last``, by the rule of the settings."""
    start = before.parameters
    worker = context.worker
    settings = context.settings.pretrain
    _wait(worker)  # for the slowest worker, so that the merge's seconds are its own
    with Cost("merge") as merging:

        def total(tensor: Tensor) -> Tensor:
            if worker.world > 1:
                merging.sent += tensor.nbytes
            return worker.sum(tensor)

        def gather(members: Sequence[Member]) -> list[Member]:
            if worker.world > 1:
                tensors = [w for member in members for w in (*member.parameters.values(), *member.masks.values())]
                merging.sent += sum(w.nbytes for w in tensors)
            return worker.interleaved(members)

        members = [Member(parameters_of(trainee.run.model), trainee.masks) for trainee in trainees]
        merged = merge[settings.merge](start, members, total=total, gather=gather)
        shapes = {name: w.shape for name, w in start.items()}
        if {name: w.shape for name, w in merged.items()} != shapes:
            raise UserError(f"pretrain.merge = {settings.merge!r} returned other parameters or shapes than {[*shapes]}")

    seconds = worker.interleaved(trainee.cost.seconds for trainee in trainees)
    earlier = before.trained or [0.0] * len(seconds)
    return Merged(
        parameters=merged,
        epoch=last,
        trained=seconds,
        slowest=before.slowest + max(now - then for now, then in zip(seconds, earlier, strict=True)),
        merging=before.merging.then(merging.gathered(worker)),
    )


def keep_seen(context: Context, storage: Storage, shards: Sequence[Tensor], trainees: Sequence[Trainee]) -> None:
    """Save one record of what the models of all workers saw, each of its own shard."""
    seen = [{name: values[each.shard] for name, values in each.recorder.state_dict().items()} for each in trainees]
    by_model = context.worker.interleaved(seen)
    if context.worker.rank > 0:
        return
    recorder = Recorder(context.samples.data.train.y)
    everything = recorder.state_dict()
    for shard, of_shard in zip(shards, by_model, strict=True):
        for name, values in of_shard.items():
            everything[name][shard] = values
    if context.settings.pretrain.joint_epochs:  # theirs will be the final record
        save_state(storage, SEEN, everything)
    else:
        recorder.load_state_dict(everything)
        save_record(storage, RESULT, recorder.record)


class ContinuedRecord(Hook):
    """Lets the recorder of joint epochs continue from the models' record."""

    priority = 0

    def __init__(self, *, job: Job):
        seen = load_state(job.storage, SEEN)
        if seen is None:
            raise UserError(f"{job.storage.root}/{SEEN} is damaged: run it again under another name")
        self.seen = seen

    def on_start(self, run: Run) -> None:
        """Restore the recorder's state; a checkpoint of the joint epochs replaces it."""
        for recorder in run.hooks:
            if isinstance(recorder, Recorder):
                recorder.load_state_dict(self.seen)


def _wait(worker: Worker) -> None:
    worker.sum(torch.zeros(1, device=worker.device))

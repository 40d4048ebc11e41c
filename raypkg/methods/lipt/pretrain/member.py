"""The training of one of LiPT's models, by itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import derive, generator, seeded
from raypkg.coresets.recorder import Recorder
from raypkg.data.coreset import Coreset
from raypkg.data.kinds import IMAGES
from raypkg.data.split import Split, at_hand
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.costs import Cost
from raypkg.engine.hooks import Hook
from raypkg.engine.loop import autocast, fit
from raypkg.engine.run import Run
from raypkg.engine.worker import Worker
from raypkg.experiments.samples import Samples, augmentations, new_model
from raypkg.methods.lipt.densities import redrawn
from raypkg.methods.lipt.settings import LiptSettings
from raypkg.methods.lipt.soup import Member, State
from raypkg.methods.sparse.hook import Masked
from raypkg.methods.sparse.masks import Masks
from raypkg.methods.sparse.rules import first_masks
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage

STATISTICS_SAMPLES = 2048  # enough for the batch-norm statistics of a merged model


@dataclass(frozen=True)
class Context:
    """What every step needs: settings, run folder and samples, which all workers share, and the worker itself."""

    settings: LiptSettings
    storage: Storage
    samples: Samples
    worker: Worker

    @cached_property
    def statistics_samples(self) -> tuple[Split, Tensor]:
        """A random part of the training samples, at hand, and their positions: for batch-norm statistics."""
        candidates = self.samples.train_indices
        order = torch.randperm(len(candidates), generator=generator(self.settings.seed, "statistics"))
        indices = candidates[order[:STATISTICS_SAMPLES]]
        return at_hand(self.samples.data.train, indices), indices

    @property
    def alone(self) -> Worker:
        """The worker by itself, for what the others take no part in."""
        return replace(self.worker, rank=0, world=1)

    def model(self) -> nn.Module:
        """Build the model with the initial weights w0, the same on every worker."""
        return new_model(self.settings, self.samples.data).to(self.worker.device)

    def checkpoints(self, name: str) -> StoredCheckpoints:
        """Return where a model, or what is merged, keeps its last epoch: a restarted worker continues from there."""
        return StoredCheckpoints(self.storage / "checkpoints" / "pretrain" / name, keep=1)


class Round(NamedTuple):
    """A part of training that all models begin with the same weights.

    Attributes:
        first: epochs that they have done before.
        last: the epoch after which they are merged.
        start: the weights.
    """

    first: int
    last: int
    start: State


class Trained(NamedTuple):
    """What the training of one model leaves: the model, what it saw of its samples, and its bill, from the beginning.

    Attributes:
        member: the model.
        seen: the recorder's state, of the shard's samples alone, in their order.
        cost: of all its rounds.
    """

    member: Member
    seen: Mapping[str, Tensor]
    cost: Cost


class Beginning(Hook):
    """Gives a model the weights that its round begins with, unless its checkpoint is of later epochs.

    Attributes:
        stage: the round.
    """

    priority = 0
    stage: Round

    def __init__(self, masks: Masks):
        self.masks = masks

    def on_epoch(self, run: Run) -> None:
        """Replace the weights before the round's first epoch, and forget the momentum of those that were."""
        check_follows(run, self.stage)
        if run.epoch > self.stage.first:
            return
        weights = {name: w * self.masks.get(name, 1) for name, w in self.stage.start.items()}
        run.model.load_state_dict(weights, strict=False)  # batch-norm statistics, unused in training, stay
        run.optimizer.state.clear()


class Trainee(NamedTuple):
    """One of the models, which stays in the memory of the worker that trains it from round to round.

    Attributes:
        run: its training.
        checkpoints: from which a restarted worker goes on.
        shard: the samples that it trains on, int64.
        masks: that it trains under; empty = dense.
        beginning: its hook that begins a round.
        recorder: its hook that records what it sees of its samples.
    """

    run: Run
    checkpoints: StoredCheckpoints
    shard: Tensor
    masks: Masks
    beginning: Beginning
    recorder: Recorder


def prepared(context: Context, number: int, shard: Tensor, split: Split) -> Trainee:
    """Return model ``number`` ready to be trained, its masks drawn.

    Which worker trains it makes no difference to it.

    Args:
        context: of all models.
        number: of this one.
        shard: positions in the training split, int64.
        split: the training split, the shard's samples at hand.
    """
    settings = context.settings.pretrain
    data = context.samples.data
    augment = augmentations(context.settings.dataset, data)
    if settings.randaugment and data.train.kind is IMAGES:
        augment.append("randaugment")
    seed = derive(context.settings.seed, "lipt", number)
    cost = Cost("pretrain")
    with cost:  # the masks are on the bill of its training
        masks = draw_masks(context, shard, split, seed, cost)
        model = context.model()
    beginning = Beginning(masks)
    recorder = Recorder(data.train.y)
    run = Run(
        model=model,
        split=split,
        coreset=Coreset.uniform(shard),
        settings=settings,
        seed=seed,
        phase="pretrain",
        worker=context.alone,  # models exchange no gradients
        augment=augment,
        cost=cost,
        hooks=[beginning, recorder, Masked(masks)],
        label=number,
        main=False,
    )
    return Trainee(run, context.checkpoints(name_of(number)), shard, masks, beginning, recorder)


def train_member(trainee: Trainee, stage: Round) -> Trained:
    """Train a model through a round, under its own mask and on its own shard.

    A restarted worker goes on from the model's checkpoint, in this round or before.

    Raises:
        UserError: its checkpoint or that of the merged model is damaged.
    """
    run = trainee.run
    trainee.beginning.stage = stage
    run.last = stage.last
    fit(run, checkpoints=trainee.checkpoints)
    check_follows(run, stage)
    run.optimizer.state.clear()  # the next round begins without it, and it is as large as the model
    training, *_ = run.bills()  # of all attempts, if there were several
    seen = {name: values[trainee.shard] for name, values in trainee.recorder.state_dict().items()}
    return Trained(Member(parameters_of(run.model), trainee.masks), seen, training)


def check_follows(run: Run, stage: Round) -> None:
    """Refuse a checkpoint that is not of the round.

    Raises:
        UserError: it is of another, because one of the files was damaged.
    """
    if not stage.first <= run.epoch <= stage.last:
        raise UserError(
            f"checkpoints/pretrain is damaged: {name_of(run.label)} has done {run.epoch} epochs, the models were merged"
            f" after {stage.first}: run it again under another name"
        )


def name_of(number: int | None) -> str:
    """Return the name of a model's checkpoints."""
    return f"model_{number:03d}"


def draw_masks(context: Context, shard: Tensor, split: Split, seed: int, cost: Cost) -> Masks:
    """Draw a model's random masks, with the layer-wise densities that its shard suggests; none for a dense model.

    Raises:
        UserError: the user's own rule returned masks of other layers or shapes.
    """
    settings = context.settings.pretrain
    if settings.sparsity is None:
        return {}
    model = context.model()

    def draw_one() -> tuple[Tensor, Tensor]:
        batch = draw_batch(context, model, shard, split, seed)
        cost.forward += len(batch[1])
        cost.backward += len(batch[1])
        return batch

    rng = generator(seed, "densities")
    # Saliency in the precision of training; what dropout draws is the same for every model.
    with autocast(settings.precision, context.worker.device), seeded(0, "snip dropout"):
        chosen = first_masks(settings.sparsity, model, settings.density, rng=rng, draw_batch=draw_one)
    # Only the ratios are kept: with places drawn anew the models differ from each other.
    return redrawn(chosen, generator(seed, "mask"))


def draw_batch(context: Context, model: nn.Module, shard: Tensor, split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """Return one random batch of a model's shard, not augmented."""
    order = torch.randperm(len(shard), generator=generator(seed, "snip"))
    indices = shard[order[: context.settings.pretrain.batch_size]]
    return next(plain_batches(split, indices, context.worker.device, len(indices), dtype_of(model)))


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters on the CPU, without its buffers."""
    return {name: w.detach().cpu().clone() for name, w in model.named_parameters()}

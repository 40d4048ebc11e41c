"""The training of one of LiPT's models, by itself."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import derive, generator, seeded
from raypkg.coresets.record import Record
from raypkg.coresets.recorder import Recorder
from raypkg.data.coreset import Coreset
from raypkg.data.kinds import IMAGES
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.costs import Cost
from raypkg.engine.loop import autocast, fit
from raypkg.engine.run import Run
from raypkg.engine.worker import Worker
from raypkg.methods.lipt.densities import redrawn
from raypkg.methods.lipt.settings import LiptSettings
from raypkg.methods.lipt.soup import Member
from raypkg.methods.sparse.masked import Masked
from raypkg.methods.sparse.masks import Masks, shapes_of
from raypkg.methods.sparse.rules import initial as sparsity
from raypkg.phases.samples import Samples, augmentations, new_model
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage


@dataclass(frozen=True)
class Context:
    """What every step needs: settings, run folder and samples, which all workers share, and the worker itself."""

    settings: LiptSettings
    storage: Storage
    samples: Samples
    worker: Worker

    @property
    def alone(self) -> Worker:
        """The worker by itself, for what the others take no part in."""
        return replace(self.worker, rank=0, world=1)

    def model(self) -> nn.Module:
        """Build the model with the initial weights w0, the same on every worker."""
        return new_model(self.settings, self.samples.data).to(self.worker.device)

    def checkpoints(self, number: int) -> StoredCheckpoints:
        """Return where model ``number`` keeps its last epoch: a restarted worker continues from there."""
        return StoredCheckpoints(self.storage / "checkpoints" / "pretrain" / f"model_{number:03d}", keep=1)


class Trained(NamedTuple):
    """What the training of one model leaves: the model, what it saw of its samples, and its bill."""

    member: Member
    record: Record
    cost: Cost


def train_member(context: Context, number: int, shard: Tensor) -> Trained:
    """Train model ``number`` from the initial weights, under its own mask and on its own shard.

    Which worker trains it makes no difference to it.
    """
    settings = context.settings.pretrain
    data = context.samples.data
    seed = derive(context.settings.seed, "lipt", number)
    augment = augmentations(context.settings.dataset, data)
    if settings.randaugment and data.train.kind is IMAGES:
        augment.append("randaugment")
    cost = Cost("pretrain")
    with cost:  # the model and its masks are on the bill of its training
        model = context.model()
        masks = draw_masks(context, model, shard, seed, cost)
    recorder = Recorder(data.train.y)
    run = Run(
        model=model,
        split=data.train,
        coreset=Coreset.uniform(shard),
        settings=settings,
        seed=seed,
        phase="pretrain",
        worker=context.alone,  # LiPT's models exchange no gradients
        augment=augment,
        cost=cost,
        hooks=[recorder, Masked(masks)],
        label=number,
        main=False,
    )
    fit(run, checkpoints=context.checkpoints(number))
    training, *_ = run.bills()  # of all attempts, if there were several
    return Trained(Member(parameters_of(model), masks), recorder.record, training)


def draw_masks(context: Context, model: nn.Module, shard: Tensor, seed: int, cost: Cost) -> Masks:
    """Draw a model's random masks, with the layer-wise densities that its shard suggests; none for a dense model.

    Raises:
        UserError: the user's own rule returned masks of other layers or shapes.
    """
    settings = context.settings.pretrain
    if settings.sparsity is None:
        return {}
    rule = sparsity[settings.sparsity]
    batch = None
    if "batch" in rule.declares:
        batch = draw_batch(context, model, shard, seed)
        cost.forward += len(batch[1])
        cost.backward += len(batch[1])
    rng = generator(seed, "densities")
    # Saliency in the precision of training; what dropout draws is the same for every model.
    with autocast(settings.precision, context.worker.device), seeded(0, "snip dropout"):
        chosen = rule(model, settings.density, batch=batch, rng=rng)
    shapes = shapes_of(model)
    if {name: mask.shape for name, mask in chosen.items()} != shapes:
        raise UserError(f"pretrain.sparsity = {rule.name!r} returned other layers or shapes than {[*shapes]}")
    # Only the ratios are kept: with places drawn anew the models differ from each other.
    return redrawn(chosen, generator(seed, "mask"))


def draw_batch(context: Context, model: nn.Module, shard: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return one random batch of a shard, not augmented."""
    order = torch.randperm(len(shard), generator=generator(seed, "snip"))
    indices = shard[order[: context.settings.pretrain.batch_size]]
    split = context.samples.data.train
    return next(plain_batches(split, indices, context.worker.device, len(indices), dtype_of(model)))


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters on the CPU, without its buffers."""
    return {name: w.detach().cpu().clone() for name, w in model.named_parameters()}

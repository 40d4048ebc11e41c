"""The training of one of LiPT's models, by itself."""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import derive, generator, seeded
from raypkg.coresets.record import Recorder
from raypkg.data.coreset import Coreset
from raypkg.data.kinds import IMAGES
from raypkg.data.split import Split, at_hand
from raypkg.engine.loop import autocast, fit
from raypkg.engine.run import Hook, Run
from raypkg.engine.worker import Cost, Worker
from raypkg.experiments.samples import Samples, augmentations, new_model
from raypkg.methods.sparse.hook import Masked, first_batch
from raypkg.methods.sparse.masks import Masks, random_masks
from raypkg.methods.sparse.training import first_masks
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage

from .merges import Member, State
from .settings import LiptSettings

STATISTICS_SAMPLES = 2048  # enough for the batch-norm statistics of a merged model


@dataclass(frozen=True)
class Context:
    """Settings, run folder and samples, which all workers share, and the worker itself."""

    settings: LiptSettings
    storage: Storage | None  # None = no run folder, hence no checkpoints
    samples: Samples
    worker: Worker
    given: nn.Module | None = None  # with the initial weights w0; None = the model of the settings

    @cached_property
    def statistics_samples(self) -> tuple[Split, Tensor]:
        """Random training samples for batch-norm statistics: a split that holds them, and their indices."""
        candidates = self.samples.train_indices
        order = torch.randperm(len(candidates), generator=generator(self.settings.seed, "statistics"))
        indices = candidates[order[:STATISTICS_SAMPLES]]
        return at_hand(self.samples.data.train, indices), indices

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


class Beginning(Hook):
    """Gives a model the weights of its round's start, unless its checkpoint is of later epochs."""

    priority = 0
    start: State  # of the round: these three are set before each
    first: int  # epochs done before
    last: int  # the epoch after which the models are merged

    def __init__(self, masks: Masks):
        self.masks = masks

    def on_epoch(self, run: Run) -> None:
        """Replace the weights before the round's first epoch, and reset the optimiser."""
        self.check(run)
        if run.epoch == self.first:
            weights = {name: w * self.masks.get(name, 1) for name, w in self.start.items()}
            run.model.load_state_dict(weights, strict=False)  # batch-norm statistics, unused in training, stay
            run.optimizer.state.clear()

    def check(self, run: Run) -> None:
        """Refuse a checkpoint of another round: an unreadable file hides later epochs, and would change the result."""
        if not self.first <= run.epoch <= self.last:
            raise UserError(
                f"checkpoints/pretrain is damaged: {_name(run.label)} has done {run.epoch} epochs, the models were"
                f" merged after {self.first}: run it again under another name"
            )


class Trainee:
    """One of the models, which stays in the memory of its worker from round to round.

    The result does not depend on the worker that trains it. The shard is the model's training indices, int64; the split
    is the training split, or a part that holds the shard's samples.
    """

    def __init__(self, context: Context, number: int, shard: Tensor, split: Split):
        settings = context.settings.pretrain
        data = context.samples.data
        augment = augmentations(context.settings.dataset, data)
        if settings.randaugment and data.train.kind is IMAGES:
            augment.append("randaugment")
        seed = derive(context.settings.seed, "lipt", number)
        self.cost = Cost("pretrain")
        with self.cost:  # drawing the masks belongs to its training
            self.masks = _draw_masks(context, shard, split, seed, self.cost)
            model = context.model()
        self.shard = shard
        self.checkpoints = context.checkpoints(_name(number))
        self.beginning = Beginning(self.masks)
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
            hooks=[self.beginning, self.recorder, Masked(self.masks)],
            label=number,
            main=False,
        )

    def train(self, start: State, first: int, last: int) -> None:
        """Train through a round, under its own masks and on its own shard, from the last checkpoint if there is one."""
        self.beginning.start, self.beginning.first, self.beginning.last = start, first, last
        self.run.last = last
        fit(self.run, checkpoints=self.checkpoints)
        self.beginning.check(self.run)
        self.run.optimizer.state.clear()  # the next round begins without it, and it is as large as the model
        self.cost, *_ = self.run.bills()  # of all rounds and all attempts

    @property
    def member(self) -> Member:
        """The trained model."""
        return Member(parameters_of(self.run.model), self.masks)

    @property
    def seen(self) -> dict[str, Tensor]:
        """The recorder's state, of the shard's samples in their order."""
        return {name: values[self.shard] for name, values in self.recorder.state_dict().items()}


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters on the CPU, without its buffers."""
    return {name: w.detach().cpu().clone() for name, w in model.named_parameters()}


def redrawn(masks: Masks, rng: torch.Generator) -> Masks:
    """Draw random masks with the layer-wise densities of others."""
    shapes = {name: mask.shape for name, mask in masks.items()}
    densities = {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()}
    return random_masks(shapes, densities, rng)


def _draw_masks(context: Context, shard: Tensor, split: Split, seed: int, cost: Cost) -> Masks:
    """Draw a model's random masks with layer-wise densities by its own shard; none for a dense model."""
    settings = context.settings.pretrain
    if settings.sparsity is None:
        return {}
    order = torch.randperm(len(shard), generator=generator(seed, "snip"))
    drawn = shard[order[: settings.batch_size]]
    rng = generator(seed, "densities")
    model = context.model()
    # Saliency is computed in the precision of training; dropout draws the same for every model.
    with autocast(settings.precision, context.worker.device), seeded(0, "snip dropout"):
        batch = first_batch(settings.sparsity, model, split, drawn, cost)
        chosen = first_masks(settings.sparsity, model, settings.density, rng=rng, batch=batch)
    # Only the densities are kept: positions drawn at random make the models differ.
    return redrawn(chosen, generator(seed, "mask"))


def _name(number: int | None) -> str:
    return f"model_{number:03d}"

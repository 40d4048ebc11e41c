"""CREST's passes on training workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.settings import whole_steps
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.sharded import LiveModel
from raypkg.data import Data
from raypkg.engine.batches import dtype_of, plain_batches, slice_of
from raypkg.engine.costs import Cost
from raypkg.engine.loop import autocast
from raypkg.engine.run import Run
from raypkg.engine.shards import Shard, Shards
from raypkg.models.classifier import in_mode

from .algorithm import CHUNK, Compute, Derive, Loop, T
from .quadratic import trains_as_it_evaluates, weighted_derivative
from .selection import Chosen, Subset, choose_minibatches


def choose(
    shard: Shard, scorer: LiveModel, subsets: Sequence[Subset], augment: Sequence[str], size: int
) -> tuple[list[Chosen], Cost]:
    """Choose the mini-batch coreset of every ``world``-th random subset, after one forward pass over all of them."""
    own = subsets[shard.rank :: shard.world]
    cost = Cost("select")
    if not own:
        return [], cost
    with cost:
        view = _view(shard, scorer, Subset.concat(own), augment)
        cost.forward += len(view)
        return choose_minibatches(own, view, size), cost


def subset_losses(shard: Shard, scorer: LiveModel, subset: Subset, augment: Sequence[str]) -> Tensor:
    """Return the losses of this holder's slice of a subset."""
    positions = torch.arange(len(subset)).tensor_split(shard.world)[shard.rank]
    if not len(positions):
        return torch.empty(0)
    view = _view(shard, scorer, subset[positions], augment)
    return F.cross_entropy(view.logits, view.y, reduction="none")


def value_gradients(shard: Shard, scorer: LiveModel, compute: Compute, subset: Subset) -> list[tuple[Tensor, Tensor]]:
    """Compute losses and factors of gradients of every ``world``-th chunk of a subset."""
    own = subset.indices.split(CHUNK)[shard.rank :: shard.world]
    if not own:
        return []
    model = scorer.model
    batches = plain_batches(shard.data.train, torch.cat(own), shard.device, CHUNK)
    with in_mode(model, training=False), autocast(scorer.precision, shard.device):
        return [compute(lambda x: model(x).losses, x) for x, _ in batches]


def _view(shard: Shard, scorer: LiveModel, subset: Subset, augment: Sequence[str]) -> HeadView:
    data = Data(subset.split(shard.data.train, augment), shard.data.test)
    try:
        return scorer.view(replace(shard, source=data), torch.arange(len(subset)))
    except UserError as error:
        raise UserError(f"CREST cannot continue with this model ({error}): lower the learning rate") from None


class RunLoop(Loop):
    """A run's training loop, whose passes are made on shards and billed; all workers call it together."""

    run: Run

    def __init__(self, shards: Shards, size: int):
        self.shards = shards
        self.size = size  # m

    def attach(self, run: Run, epoch_steps: int) -> None:
        """Follow a run, with so many steps per epoch."""
        self.run, self.model, self.seed = run, run.model, run.seed
        self.steps = whole_steps(run.length or run.settings.epochs, epoch_steps)
        self.augment = run.augment
        self.gives_gradients = trains_as_it_evaluates(run.model)

    def weights(self) -> Mapping[str, Tensor]:
        """Return a copy of the model's state, with rank 0's buffers."""
        self.run.worker.share(self.model.buffers())
        return super().weights()

    def _scorer(self, weights: Mapping[str, Tensor] | None = None) -> LiveModel:
        """Return the model with these weights, or with the present ones and rank 0's buffers."""
        if weights is None:
            self.run.worker.share(self.model.buffers())
        return LiveModel(self.model_with(weights), self.run.settings.precision)

    def choose(self, subsets: Sequence[Subset], weights: Mapping[str, Tensor] | None) -> list[Chosen]:
        """Choose a mini-batch coreset from each random subset; they are shared by rank."""
        bill = self.run.bill("select")
        with self.run.cost.apart(bill):
            choices = self.shards.map(choose, self._scorer(weights), subsets, self.augment, self.size)
        if self.run.worker.rank == 0:  # bills are summed over the workers, all of which have all choices
            bill.forward += sum(cost.forward for _, cost in choices)
        # The shard of rank r chose for every ``world``-th subset.
        places = (divmod(number, len(choices)) for number in range(len(subsets)))
        return [choices[rank][0][turn] for turn, rank in places]

    def value_gradients(self, compute: Compute, subset: Subset) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses, factors of gradients and sources of a random subset; chunks are shared by rank."""
        bill = self.run.bill("select")
        with self.run.cost.apart(bill):
            own = self.shards.map(value_gradients, self._scorer(), compute, subset)
        if self.run.worker.rank == 0:
            bill.forward += len(subset)
        chunks = range(-(-len(subset) // CHUNK))
        parts = [own[number % len(own)][number // len(own)] for number in chunks]
        losses, factors = (torch.cat(each) for each in zip(*parts, strict=True))
        return losses, factors, self.run.split.y[subset.indices]

    def losses(self, subset: Subset) -> Tensor:
        """Return the losses of a random subset with the present weights, [r]."""
        bill = self.run.bill("check")
        with self.run.cost.apart(bill):
            slices = self.shards.map(subset_losses, self._scorer(), subset, self.augment)
        if self.run.worker.rank == 0:
            bill.forward += len(subset)
        return torch.cat(slices)

    def derivative(self, derive: Derive, parameters: Sequence[Tensor], samples: Subset, weights: Tensor) -> Tensor:
        """Return a derivative of the mean of w · loss over all workers in evaluation mode, [p]."""
        run, bill = self.run, self.run.bill("model")
        device, size = run.worker.device, run.settings.at_once
        own = slice_of(torch.arange(len(samples)), run.worker)
        own_weights = slice_of(weights, run.worker).to(device)

        def logits(x: Tensor) -> Tensor:
            with autocast(run.settings.precision, x.device):
                return run.model(x)

        # Dropout and batch norm would make the model noisy.
        with run.cost.apart(bill), in_mode(run.model, training=False):
            run.worker.share(run.model.buffers())
            batches = plain_batches(samples.split(run.split, self.augment), own, device, size, dtype_of(run.model))
            total = weighted_derivative(logits, batches, own_weights.split(size), len(samples), derive, parameters)
            total = run.worker.sum(total)
        bill.forward += len(own)
        bill.backward += len(own)
        bill.sent += total.nbytes * (run.worker.world > 1)
        return total

    def agreed(self, value: T) -> T:
        """Return rank 0's value."""
        agreed: T = self.run.worker.first(value)
        return agreed

"""CREST's passes on training workers and actors, and its choices in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypkg.cluster.actors import hold_within_worker
from raypkg.core.errors import UserError
from raypkg.core.settings import whole_steps
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.sharded import LiveModel, Scorer, SentModel
from raypkg.data import Data
from raypkg.engine.batches import dtype_of, plain_batches, slice_of
from raypkg.engine.costs import Cost
from raypkg.engine.loop import autocast
from raypkg.engine.run import Run
from raypkg.engine.shards import FirstWorkerShards, Pending, Shard, Shards, WorkerShards
from raypkg.engine.worker import Worker, memory_bound
from raypkg.experiments.samples import Samples
from raypkg.experiments.training import Job
from raypkg.models.classifier import in_mode

from .algorithm import CHUNK, Compute, CrestAlgorithm, Derive, Loop, T
from .quadratic import trains_as_it_evaluates, weighted_derivative
from .selection import Chosen, Pool, Subset, choose_minibatches
from .settings import CrestOptions

ToScorer = Callable[[nn.Module], Scorer]  # brings a model into the form that shards take
Choices = Sequence[tuple[Sequence[Chosen], Cost]]  # of every shard


@contextmanager
def choosers(worker: Worker, job: Job, samples: Samples, options: CrestOptions) -> Iterator[tuple[Shards, ToScorer]]:
    """Give the holders that choose, training workers or actors, and the form in which they take a model."""
    indices, held_out, precision = samples.train_indices, samples.held_out, job.training.precision
    if not options.actors:
        # Every worker holds all samples, so that they share the subsets of a pool by rank.
        shards = [Shard(samples.data, indices, held_out, worker.device, r, worker.world) for r in range(worker.world)]
        yield WorkerShards(shards, worker), partial(LiveModel, precision=precision)
        return

    def to_scorer(model: nn.Module) -> Scorer:
        return SentModel.of(job.experiment.model, samples.data.train, model.state_dict(), precision)

    # Actors open the data set themselves: its settings travel, not its samples.
    dataset, world = job.experiment.dataset, options.actors
    shards = [Shard(dataset, indices, held_out, rank=rank, world=world) for rank in range(world)]
    on_actors = hold_within_worker(shards, job.experiment.cluster, "crest.actors")
    with on_actors if worker.rank == 0 else nullcontext() as remote:  # rank 0 reaches the actors for all workers
        yield FirstWorkerShards(remote, worker), to_scorer


def choose(
    shard: Shard, scorer: Scorer, subsets: Sequence[Subset], augment: Sequence[str], size: int, memory: int
) -> tuple[list[Chosen], Cost]:
    """Choose the mini-batch coreset of every ``world``-th random subset, after one forward pass over all of them."""
    own = subsets[shard.rank :: shard.world]
    cost = Cost("select")
    if not own:
        return [], cost
    with cost:
        view = _view(shard, scorer, Subset.concat(own), augment)
        cost.forward += len(view)
        return choose_minibatches(own, view, size, memory=memory), cost


def subset_losses(shard: Shard, scorer: Scorer, subset: Subset, augment: Sequence[str]) -> Tensor:
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


def _view(shard: Shard, scorer: Scorer, subset: Subset, augment: Sequence[str]) -> HeadView:
    data = Data(subset.split(shard.data.train, augment), shard.data.test)
    try:
        return scorer.view(replace(shard, source=data), torch.arange(len(subset)))
    except UserError as error:
        raise UserError(f"CREST cannot continue with this model ({error}): lower the learning rate") from None


class RunLoop(Loop):
    """A run's training loop, whose passes are made on shards and billed; all workers call it together."""

    run: Run

    def __init__(self, shards: Shards, scorer: ToScorer, options: CrestOptions, size: int):
        self.shards = shards
        self.scorer = scorer
        self.options = options
        self.size = size  # m

    def attach(self, run: Run, epoch_steps: int) -> None:
        """Follow a run, with so many steps per epoch."""
        self.run, self.model, self.seed = run, run.model, run.seed
        self.steps = whole_steps(run.length or run.settings.epochs, epoch_steps)
        self.augment = run.augment if self.options.augmented else ()
        same_images = self.options.augmented or not run.augment
        self.gives_gradients = same_images and trains_as_it_evaluates(run.model)

    def weights(self) -> Mapping[str, Tensor]:
        """Return a copy of the model's state, with rank 0's buffers."""
        self.run.worker.share(self.model.buffers())
        return super().weights()

    def choose(
        self, subsets: Sequence[Subset], weights: Mapping[str, Tensor] | None, started: Pending | None = None
    ) -> list[Chosen]:
        """Choose a mini-batch coreset from each random subset; ``started`` is doing so in the background."""
        bill = self.run.bill("select")
        with self.run.cost.apart(bill):
            choices: Choices = started() if started else self.shards.map(choose, *self.task(subsets, weights))
        if self.run.worker.rank == 0:  # bills are summed over the workers, all of which have all choices
            bill.forward += sum(cost.forward for _, cost in choices)
            if started:  # the block's own time is that of waiting
                bill.total_seconds += sum(cost.total_seconds for _, cost in choices)
        # The shard of rank r chose for every ``world``-th subset.
        places = (divmod(number, len(choices)) for number in range(len(subsets)))
        return [choices[rank][0][turn] for turn, rank in places]

    def value_gradients(self, compute: Compute, subset: Subset) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses, factors of gradients and sources of a random subset; chunks are shared by rank."""
        bill = self.run.bill("select")
        with self.run.cost.apart(bill):
            self.run.worker.share(self.model.buffers())
            own = self.shards.map(value_gradients, self.scorer(self.model), compute, subset)
        if self.run.worker.rank == 0:
            bill.forward += len(subset)
        chunks = range(-(-len(subset) // CHUNK))
        parts = [own[number % len(own)][number // len(own)] for number in chunks]
        losses, factors = (torch.cat(each) for each in zip(*parts, strict=True))
        return losses, factors, self.run.split.y[subset.indices]

    def task(self, subsets: Sequence[Subset], weights: Mapping[str, Tensor] | None) -> tuple[Any, ...]:
        """Return the arguments of the function ``choose`` after the shard."""
        if weights is None:
            self.run.worker.share(self.model.buffers())
        scorer = self.scorer(self.model_with(weights))
        return scorer, subsets, self.augment, self.size, memory_bound(self.options.memory)

    def losses(self, subset: Subset) -> Tensor:
        """Return the losses of a random subset with the present weights, [r]."""
        bill = self.run.bill("check")
        with self.run.cost.apart(bill):
            self.run.worker.share(self.model.buffers())
            slices = self.shards.map(subset_losses, self.scorer(self.model), subset, self.augment)
        if self.run.worker.rank == 0:
            bill.forward += len(subset)
        return torch.cat(slices)

    def derivative(self, derive: Derive, parameters: Sequence[Tensor], samples: Subset, weights: Tensor) -> Tensor:
        """Return the mean of w · loss over all workers in evaluation mode, then its derivative, [1 + p]."""
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


class Overlapped(CrestAlgorithm):
    """CREST that chooses in the background: an expired pool serves one more interval while the next is chosen."""

    loop: RunLoop
    background: Pending | None = None  # chooses the coresets that a pool awaits; one pool at a time

    def _renew(self) -> None:
        """Begin a pool with the present weights, or use it if it was begun an interval ago."""
        state = self.state
        chosen_earlier = state.coming is not None
        coming = state.coming or self._new_pool()
        if not chosen_earlier and state.pool.update:
            state.coming = coming
        else:
            state.coming = None
            self._use(coming, chosen_earlier=chosen_earlier)

    def _check(self) -> None:
        """Check the local model, unless an expired pool has served one interval more."""
        if not self.state.region.expired:
            super()._check()

    def _drawn(self, steps: range) -> tuple[range, list[Chosen]]:
        """Start to choose the coresets that training will probably draw after these steps."""
        state, region, seed = self.state, self.state.region, self.loop.seed
        drawn = super()._drawn(steps)
        pool, start = state.pool, steps.stop
        if state.coming:  # it takes over after the last interval of the expired pool
            pool, start = state.coming, steps.start + region.interval - region.age
        following = range(start, min(start + region.interval, self.loop.steps))
        if not pool.awaited:
            pool.awaited = pool.missing(pool.draw(following, seed))
            if pool.awaited:
                task = self.loop.task([self._subset(pool, p) for p in pool.awaited], pool.weights)
                self.background = self.loop.shards.start(choose, *task)
        return drawn

    def coresets(self, pool: Pool, wanted: Iterable[int]) -> list[Chosen]:
        """Return coresets of a pool, after those that it awaits."""
        if awaited := pool.awaited:
            # None if the task ended with the process from whose checkpoint training resumed
            started, self.background, pool.awaited = self.background, None, []
            self._choose(pool, awaited, started)
        return super().coresets(pool, wanted)

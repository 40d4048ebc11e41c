"""CREST's passes on training workers and actors, and its choices in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypkg.cluster.actors import hold_within_worker
from raypkg.core.errors import UserError
from raypkg.core.settings import whole_steps
from raypkg.coresets.gradients import HeadView, evaluating
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

from .algorithm import CrestAlgorithm, Derive
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


def _view(shard: Shard, scorer: Scorer, subset: Subset, augment: Sequence[str]) -> HeadView:
    data = Data(subset.split(shard.data.train, augment), shard.data.test)
    try:
        return scorer.view(replace(shard, source=data), torch.arange(len(subset)))
    except UserError as error:
        raise UserError(f"CREST cannot continue with this model ({error}): lower the learning rate") from None


@dataclass(eq=False)
class RunLoop:
    """A run's training loop, whose passes are made on shards and billed; all workers call it together."""

    shards: Shards
    scorer: ToScorer
    options: CrestOptions
    size: int  # m
    epoch_steps: int  # steps of an epoch
    run: Run = field(init=False)

    @property
    def model(self) -> nn.Module:
        """The model in training."""
        return self.run.model

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.run.seed

    @property
    def steps(self) -> int:
        """The number of steps of the whole training."""
        return whole_steps(self.run.length or self.run.settings.epochs, self.epoch_steps)

    @property
    def augment(self) -> Sequence[str]:
        """The augmentation of samples during selection."""
        return self.run.augment if self.options.augmented else ()

    @property
    def gives_gradients(self) -> bool:
        """Whether training sees the samples and the model as they are during selection."""
        same_images = self.options.augmented or not self.run.augment
        return bool(same_images and trains_as_it_evaluates(self.model))

    def weights(self) -> Mapping[str, Tensor]:
        """Return a copy of the model's state, with rank 0's buffers."""
        self.run.worker.share(self.model.buffers())
        return deepcopy(self.model.state_dict())

    def choose(self, subsets: Sequence[Subset], weights: Mapping[str, Tensor] | None) -> list[Chosen]:
        """Choose a mini-batch coreset from each random subset, each shard from its share."""
        with self.run.cost.apart(self.run.bill("select")):
            return self.joined(self.shards.map(choose, *self._task(subsets, weights)), len(subsets))

    def start(self, subsets: Sequence[Subset], weights: Mapping[str, Tensor] | None) -> Pending:
        """Start to choose in the background; ``awaited`` gives the coresets."""
        return self.shards.start(choose, *self._task(subsets, weights))

    def awaited(self, pending: Pending, count: int) -> list[Chosen]:
        """Wait for the coresets of ``count`` random subsets."""
        bill = self.run.bill("select")
        with self.run.cost.apart(bill):
            choices = pending()
            if self.run.worker.rank == 0:  # the block's own time is that of waiting
                bill.total_seconds += sum(cost.total_seconds for _, cost in choices)
            return self.joined(choices, count)

    def _task(self, subsets: Sequence[Subset], weights: Mapping[str, Tensor] | None) -> tuple[Any, ...]:
        """Return the arguments of ``choose`` after the shard."""
        model = self.model
        if weights is None:
            self.run.worker.share(model.buffers())
        else:
            model = deepcopy(model)
            model.load_state_dict(weights)
        return self.scorer(model), subsets, self.augment, self.size, memory_bound(self.options.memory)

    def joined(self, choices: Choices, count: int) -> list[Chosen]:
        """Return the choices in the order of the subsets: the shard of rank r chose for every ``world``-th."""
        if self.run.worker.rank == 0:  # bills are summed over the workers, all of which have all choices
            self.run.bill("select").forward += sum(cost.forward for _, cost in choices)
        places = (divmod(number, len(choices)) for number in range(count))
        return [choices[rank][0][turn] for turn, rank in places]

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
        with run.cost.apart(bill), evaluating(run.model):  # dropout and batch norm would make the model noisy
            run.worker.share(run.model.buffers())
            batches = plain_batches(samples.split(run.split, self.augment), own, device, size, dtype_of(run.model))
            total = weighted_derivative(
                self._logits, batches, own_weights.split(size), len(samples), derive, parameters
            )
            bill.forward += len(own)
            bill.backward += len(own)
            bill.sent += total.nbytes * (run.worker.world > 1)
            return run.worker.sum(total)

    def _logits(self, x: Tensor) -> Tensor:
        with autocast(self.run.settings.precision, x.device):
            return self.model(x)

    def agreed(self, value: float) -> float:
        """Return rank 0's value."""
        return self.run.worker.first(value)


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
                self.background = self.loop.start(self._subsets(pool, pool.awaited), pool.weights)
        return drawn

    def coresets(self, pool: Pool, wanted: Iterable[int]) -> list[Chosen]:
        """Return coresets of a pool, after those that it awaits."""
        if awaited := pool.awaited:
            pool.awaited = []
            background, self.background = self.background, None
            if background:
                self._add(pool, awaited, self.loop.awaited(background, len(awaited)))
            else:  # the task ended with the process from whose checkpoint training resumed
                super().coresets(pool, awaited)
        return super().coresets(pool, wanted)

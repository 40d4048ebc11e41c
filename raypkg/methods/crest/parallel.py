"""CREST's work on workers and actors: choices, losses of checks, and derivatives for the local model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raypkg.cluster.actors import hold_within_worker
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.gradients import HeadView, evaluating
from raypkg.coresets.sharded import LiveModel, Scorer, SentModel
from raypkg.data import Data
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.batches import dtype_of, plain_batches, slice_of
from raypkg.engine.costs import Cost
from raypkg.engine.loop import autocast
from raypkg.engine.run import Run
from raypkg.engine.shards import FirstWorkerShards, Pending, Shard, Shards, WorkerShards
from raypkg.engine.worker import Worker, memory_bound
from raypkg.experiments.samples import Samples
from raypkg.experiments.training import Job

from .quadratic import MovingMoments, covered_parameters, gradient_of, hessian_diagonal
from .selection import Chosen, Pool, Subset, choose_minibatch
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
    chosen = []
    cost = Cost("select")
    if own:
        with cost:
            view = _view(shard, scorer, Subset.concat(own), augment)
            cost.forward += len(view)
            sizes = [len(subset) for subset in own]
            for subset, logits, y in zip(own, view.logits.split(sizes), view.y.split(sizes), strict=True):
                chosen.append(choose_minibatch(subset, logits, y, size, memory=memory))
    return chosen, cost


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


def augment_of(run: Run, options: CrestOptions) -> Sequence[str]:
    """Return the augmentations of samples during selection."""
    return run.augment if options.augmented else ()


def _in_order(choices: Choices, count: int) -> list[Chosen]:
    """Return the choices in the order of the subsets: the shard of rank r chose for every ``world``-th."""
    places = (divmod(number, len(choices)) for number in range(count))
    return [choices[rank][0][turn] for turn, rank in places]


@dataclass(eq=False)
class Chooser:
    """Chooses coresets on the shards: in line when training draws them, or ahead in the background.

    All workers call it together and get the same coresets. ``on_choice`` receives each new coreset of a pool and its
    random subset, in the order of the draws.
    """

    shards: Shards
    scorer: ToScorer
    options: CrestOptions
    size: int  # m
    subset_size: int  # r
    on_choice: Callable[[Pool, Subset, Chosen], None]
    background: Pending | None = None  # computes what a pool awaits; one pool at a time

    def subset(self, run: Run, pool: Pool, p: int) -> Subset:
        """Return the random subset V_p of a pool."""
        return pool.subset(p, self.subset_size, augment_of(run, self.options), run.seed)

    def coresets(self, run: Run, pool: Pool, wanted: Iterable[int]) -> list[Chosen]:
        """Return coresets of a pool, after computing missing ones with the weights of the pool."""
        wanted = list(wanted)
        bill = run.bill("select")
        with run.cost.apart(bill):
            if awaited := pool.awaited:
                pool.awaited = []
                background, self.background = self.background, None
                if background:
                    choices = background()
                    if run.worker.rank == 0:  # the block's own time is that of waiting
                        bill.total_seconds += sum(cost.total_seconds for _, cost in choices)
                else:  # the task ended with the process from whose checkpoint training resumed
                    choices = self.shards.map(choose, *self._task(run, pool, awaited))
                self._add(run, pool, awaited, choices)
            if missing := pool.missing(wanted):
                choices = self.shards.map(choose, *self._task(run, pool, missing))
                self._add(run, pool, missing, choices)
        return [pool.chosen[p] for p in wanted]

    def begin(self, run: Run, pool: Pool, wanted: Iterable[int]) -> None:
        """Start choosing coresets of a pool in the background, unless it awaits some already."""
        if pool.awaited:
            return
        pool.awaited = pool.missing(wanted)
        if pool.awaited:
            self.background = self.shards.start(choose, *self._task(run, pool, pool.awaited))

    def _task(self, run: Run, pool: Pool, wanted: Sequence[int]) -> tuple[Any, ...]:
        """Return the arguments of ``choose`` after the shard."""
        subsets = [self.subset(run, pool, p) for p in wanted]
        model = run.model
        if pool.weights is not None:
            model = deepcopy(run.model)
            model.load_state_dict(pool.weights)
        return self._arguments(run, model, subsets)

    def _arguments(self, run: Run, model: nn.Module, subsets: Sequence[Subset]) -> tuple[Any, ...]:
        memory = memory_bound(self.options.memory)
        return self.scorer(model), subsets, augment_of(run, self.options), self.size, memory

    def _add(self, run: Run, pool: Pool, wanted: Sequence[int], choices: Choices) -> None:
        for p, chosen in zip(wanted, _in_order(choices, len(wanted)), strict=True):
            pool.chosen[p] = chosen
            self.on_choice(pool, self.subset(run, pool, p), chosen)
        if run.worker.rank == 0:  # bills are summed over the workers, all of which have all choices
            run.bill("select").forward += sum(cost.forward for _, cost in choices)

    def losses(self, run: Run, subset: Subset) -> Tensor:
        """Return the losses of a random subset with the present weights, [r]."""
        bill = run.bill("check")
        with run.cost.apart(bill):
            run.worker.share(run.model.buffers())
            slices = self.shards.map(subset_losses, self.scorer(run.model), subset, augment_of(run, self.options))
        if run.worker.rank == 0:
            bill.forward += len(subset)
        return torch.cat(slices)


def fit_moments(
    run: Run,
    moments: MovingMoments,
    coresets: Sequence[Chosen],
    options: CrestOptions,
    *,
    update: int,
    known: Tensor | None = None,
) -> tuple[MovingMoments, float]:
    """Update moments with gradient and curvature of the mean of w · loss over coresets; return them and the mean.

    Each coreset updates them, or all together (``options.smoothing``). ``update`` is l, the number of the pool. The
    gradient is ``known`` if training has just computed it for the only coreset; the mean is then that of the choice.
    """
    parameters = covered_parameters(run.model, options.parameters)
    groups = [[coreset] for coreset in coresets] if options.smoothing == "coreset" else [coresets]
    losses = []
    for number, group in enumerate(groups):
        samples = Subset.concat([chosen.samples for chosen in group])
        weights = torch.cat([chosen.coreset.weights for chosen in group])
        split = samples.split(run.split, augment_of(run, options))
        gradient, loss = known, sum(chosen.loss for chosen in group) / len(group)
        if gradient is None:
            everything = Coreset(torch.arange(len(samples)), weights)
            gradient, loss = _derivative(run, gradient_of, parameters, split, everything)

        diagonal = None
        if options.order == 2:
            # A double backward pass is the most expensive part of CREST, so some of the samples give the curvature.
            quarter = max(1, run.settings.batch_size // 4)
            count = quarter if options.curvature is None else options.curvature
            rng = generator(run.seed, "crest curvature", update, number)
            some = torch.randperm(len(samples), generator=rng)[: count or None]

            def estimate(
                loss: Tensor, parameters: Sequence[Tensor], name: tuple[int, int] = (update, number)
            ) -> Tensor:
                # All batches draw the same signs z: z ⊙ Hz is linear in H, so estimates add up to that of the sum.
                return hessian_diagonal(loss, parameters, generator(run.seed, "crest signs", *name))

            try:
                with sdpa_kernel(SDPBackend.MATH):  # fused kernels of attention have no second derivative
                    diagonal, _ = _derivative(run, estimate, parameters, split, Coreset(some, weights[some]))
            except RuntimeError as error:
                if "derivative for" not in str(error):
                    raise
                raise UserError(f"CREST's curvature cannot be computed: {error}; give --crest.order 1") from None
        moments = moments.updated(gradient, diagonal)
        losses.append(loss)
    return moments, sum(losses) / len(losses)


def _derivative(
    run: Run,
    derive: Callable[[Tensor, Sequence[Tensor]], Tensor],
    parameters: Sequence[Tensor],
    split: Split,
    coreset: Coreset,
) -> tuple[Tensor, float]:
    """Return a linear derivative of the mean of w · loss in evaluation mode [p], and that mean, over all workers."""
    device = run.worker.device
    size = run.settings.at_once
    own_indices = slice_of(coreset.indices, run.worker)
    own_weights = slice_of(coreset.weights, run.worker).to(device)
    entries = sum(parameter.numel() for parameter in parameters)
    total = torch.zeros(1 + entries, device=device)  # the loss, then its derivative: one all-reduce for both
    batches = plain_batches(split, own_indices, device, size, dtype_of(run.model))
    with evaluating(run.model):  # dropout and batch norm would make the model noisy, and be moved by it
        for (x, y), w in zip(batches, own_weights.split(size), strict=True):
            with autocast(run.settings.precision, x.device):
                logits = run.model(x)
            losses = F.cross_entropy(logits.float(), y, reduction="none")  # [b]
            loss = losses @ w.float() / len(coreset)  # over all, so that batches and workers add up
            total += torch.cat([loss.detach()[None], derive(loss, parameters)])
    bill = run.bill("model")
    bill.forward += len(own_indices)
    bill.backward += len(own_indices)
    bill.sent += total.nbytes * (run.worker.world > 1)
    total = run.worker.sum(total)
    if not total.isfinite().all():
        raise UserError(f"step {run.step}: the derivatives of CREST's model are not finite: lower the learning rate")
    return total[1:], float(total[0])

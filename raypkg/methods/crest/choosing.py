"""Who chooses mini-batch coresets, the training workers or actors of their own, and what each of them computes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypkg.cluster.actors import hold_within_worker
from raypkg.core.errors import UserError
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.sharded import LiveModel, Scorer, SentModel
from raypkg.data import Data
from raypkg.data.split import Split
from raypkg.engine.costs import Cost
from raypkg.engine.shards import FirstWorkerShards, Shard, Shards, WorkerShards
from raypkg.engine.worker import Worker
from raypkg.experiments.samples import Samples
from raypkg.experiments.training import Job

from .minibatch import Chosen, choose_minibatch
from .settings import CrestOptions
from .subset import Subset

ToScorer = Callable[[nn.Module], Scorer]  # brings a model into the form that shards take


@contextmanager
def choosing(worker: Worker, job: Job, samples: Samples, options: CrestOptions) -> Iterator[tuple[Shards, ToScorer]]:
    """Give who chooses, each with all samples, and the form in which they take a model, until the block ends."""
    precision = job.training.precision
    if not options.actors:
        # Every worker holds all samples, so that they can share the subsets of a pool by rank.
        shards = [
            Shard(samples.data, samples.train_indices, samples.held_out, worker.device, rank, worker.world)
            for rank in range(worker.world)
        ]
        yield WorkerShards(shards, worker), partial(LiveModel, precision=precision)
        return
    # Actors open the data set themselves: its settings travel, not its samples.
    shards = [
        Shard(job.experiment.dataset, samples.train_indices, samples.held_out, rank=rank, world=options.actors)
        for rank in range(options.actors)
    ]
    to_scorer = partial(_sent, job, samples.data.train)
    on_actors = hold_within_worker(shards, job.experiment.cluster, "crest.actors")
    with on_actors if worker.rank == 0 else nullcontext() as held:  # rank 0 reaches the actors for all
        yield FirstWorkerShards(held, worker), to_scorer


def _sent(job: Job, split: Split, model: nn.Module) -> SentModel:
    return SentModel.of(job.experiment.model, split, model.state_dict(), job.training.precision)


def choose(
    shard: Shard, scorer: Scorer, subsets: Sequence[Subset], augment: Sequence[str], size: int, memory: int
) -> tuple[list[Chosen], Cost]:
    """Choose the mini-batch coreset of every ``world``-th random subset, in one forward pass over all of them."""
    own = subsets[shard.rank :: shard.world]
    cost = Cost("select")
    if not own:
        return [], cost
    with cost:
        view = _view(shard, scorer, Subset.concat(own), augment)
        cost.forward += len(view)
        sizes = [len(subset) for subset in own]
        logits = view.logits.split(sizes)
        labels = view.y.split(sizes)
        chosen = [
            choose_minibatch(*subset_and_view, size, memory=memory)
            for subset_and_view in zip(own, logits, labels, strict=True)
        ]
    return chosen, cost


def subset_losses(shard: Shard, scorer: Scorer, subset: Subset, augment: Sequence[str]) -> Tensor:
    """Return the losses of this holder's slice of a subset."""
    positions = torch.arange(len(subset)).tensor_split(shard.world)[shard.rank]
    if not len(positions):
        return torch.empty(0)
    view = _view(shard, scorer, subset[positions], augment)
    return F.cross_entropy(view.logits, view.y, reduction="none")


def _view(shard: Shard, scorer: Scorer, subset: Subset, augment: Sequence[str]) -> HeadView:
    split = subset.split(shard.data.train, augment)
    alone = replace(shard, source=Data(split, shard.data.test))
    try:
        return scorer.view(alone, torch.arange(len(subset)))
    except UserError as error:
        raise UserError(f"CREST cannot continue with this model ({error}): lower the learning rate") from None

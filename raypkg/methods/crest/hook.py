"""CREST as a hook of a run: batches, checkpoints and results of ``CrestAlgorithm``, and its passes on the workers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import whole_steps
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.sharded import LiveModel
from raypkg.data import Data
from raypkg.data.augment import compose
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import Batch, Epoch, ahead, dtype_of, plain_batches, slice_of, training_batch
from raypkg.engine.costs import Cost
from raypkg.engine.hooks import Hook, Results, Selected, hook
from raypkg.engine.loop import autocast
from raypkg.engine.run import Run
from raypkg.engine.shards import Shard, Shards, WorkerShards
from raypkg.engine.worker import Worker
from raypkg.experiments.samples import Samples
from raypkg.experiments.training import Job
from raypkg.models.classifier import in_mode

from . import plots
from .algorithm import CHUNK, Compute, CrestAlgorithm, Derive, Loop, T
from .colm import Colm, check_kind
from .quadratic import trains_as_it_evaluates, weighted_derivative
from .selection import Chosen, Pool, Subset, choose_minibatches
from .settings import CrestOptions

DEFAULTS = CrestOptions()
BATCH_NORM = (
    "CREST loses most of its gain with batch norm, whose statistics of medoids are not those of the data: use group"
    " norm or frozen statistics (for the built-in resnets --set model.options.norm=group, or =frozen)"
)
log = logging.getLogger(__name__)


class Crest(Hook):
    """Training on mini-batch coresets (CREST, arXiv:2306.01244), as ``CrestAlgorithm`` chooses them.

    It trains on batches of ``size`` = m out of the samples ``indices``, int64 [n]. Each shard has all samples and
    chooses a share.
    """

    priority = 0

    def __init__(self, options: CrestOptions, shards: Shards, indices: Tensor, size: int):
        self.options = options
        self.indices = indices
        self.steps = -(-len(indices) // size)  # per epoch, as on all samples
        self.loop = RunLoop(shards, size)
        kind = Colm if options.choose == "colm" else CrestAlgorithm
        self.algorithm = kind(options, self.loop, indices, size, on_choice=self._note_choice)
        self.counts = torch.zeros(int(indices.max()) + 1, dtype=torch.int32)  # steps that trained on each sample
        self.picked: list[Tensor] = []  # (update, sample) of every choice, each int32 [2, ·]

    def on_start(self, run: Run) -> None:
        """Refuse a model of another kind."""
        check_kind(run.model, self.options.choose)
        augment = compose(run.augment)
        if augment.alternating:
            raise UserError("dataset.augment = altflip: CREST draws samples without regard to epochs: use flip")
        if augment.is_own:
            raise UserError(f"dataset.augment = {','.join(run.augment)}: CREST augments by operations of effray alone")

    def batches(self, run: Run) -> Epoch:
        """Return the mini-batch coresets of an epoch."""
        if run.step == 0 and run.worker.rank == 0:
            for line in _warnings(run.model):
                log.warning(line)
        self.loop.attach(run, self.steps)
        self.algorithm.step = run.step
        return Epoch(self.steps, self._loaded(run, min(run.step + self.steps, self.loop.steps)))

    def _loaded(self, run: Run, end: int) -> Iterator[Batch]:
        """Yield the coresets as batches, loaded ahead, and count the samples."""
        augment = compose(run.augment)

        def load(job: tuple[int, Chosen]) -> Batch:
            step, chosen = job
            shuffled = chosen.shuffled(generator(run.seed, "crest batch", step))  # they spread over workers' slices
            coreset, uniforms = shuffled.coreset, shuffled.draws
            return training_batch(run.split, coreset, augment, uniforms, run.worker, dtype_of(run.model))

        for steps, drawn in self.algorithm.intervals(end):
            batches = ahead(load, zip(steps, drawn, strict=True))
            for batch, chosen in zip(batches, drawn, strict=True):
                yield batch
                self.algorithm.trained()
                self.counts[chosen.coreset.indices] += 1

    def on_gradients(self, run: Run) -> None:
        """Give the gradient of a new region's first step to its local model."""
        self.algorithm.on_gradients()

    def _note_choice(self, pool: Pool, chosen: Chosen) -> None:
        indices = chosen.coreset.indices
        self.picked.append(torch.stack([torch.full_like(indices, pool.update), indices]).int())

    def on_epoch_end(self, run: Run) -> None:
        """Join the picks: one tensor is saved faster than thousands."""
        self.picked = [torch.cat(self.picked, dim=1)]

    def results(self, run: Run) -> Results:
        """Return checks and choices with their plots, and the trained samples as a coreset."""
        state = self.algorithm.state
        (picked,) = (rows.numpy() for rows in self.picked)  # [2, ·]
        steps = self.counts[self.indices].numpy()
        tables = {
            "crest": pa.Table.from_pylist(state.history),
            "minibatches": pa.table({"update": picked[0], "index": picked[1]}),
            "steps": pa.table({"index": self.indices.numpy(), "steps": steps}),
        }
        pictures: dict[str, Callable[[Path], None]] = {}
        if self.options.tau:
            found = f"CREST chose {state.pool.update} pools of mini-batch coresets: see plots/regions.png"
            pictures["regions"] = partial(plots.checks, state.history, self.options.tau)
        else:
            found = f"CREST chose a mini-batch coreset for each of {state.pool.update} steps"
        used = self.counts.nonzero()[:, 0]
        times = self.counts[used]
        trained_on = Coreset(used, times / times.float().mean())
        return Results(
            facts={"pools": state.pool.update},
            findings=[found, *_warnings(run.model)],
            tables=tables,
            plots=pictures,
            selected=Selected(trained_on, {"method": "crest", **self.options.model_dump()}, self.indices),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state, which may lie inside a region, as tensors and plain values."""
        return {**self.algorithm.state_dict(), "counts": self.counts.clone(), "picked": list(self.picked)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        values = dict(state)
        self.counts = values.pop("counts").clone()  # it changes in place
        self.picked = list(values.pop("picked"))
        self.algorithm.load_state_dict(values)


def _warnings(model: nn.Module) -> list[str]:
    """Return a line if batch norm is active, so a sample's gradient depends on the others of its batch."""
    active = any(isinstance(module, _BatchNorm) and module.training for module in model.modules())
    return [BATCH_NORM] if active else []


@hook("crest", source="arXiv:2306.01244")
def crest(*, job: Job, worker: Worker, samples: Samples, options: CrestOptions = DEFAULTS) -> Crest:
    """Train on mini-batch coresets, renewed at every step or when a local model of the loss expires."""
    options.check(job.samples_used(samples), job.training, job.experiment)
    # Every worker holds all samples, so that they share the subsets of a pool by rank.
    data, indices, held_out = samples
    shards = [Shard(data, indices, held_out, worker.device, rank, worker.world) for rank in range(worker.world)]
    return Crest(options, WorkerShards(shards, worker), indices, job.training.batch_size)


# Passes on training workers, whose shards have all samples and each do a share


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

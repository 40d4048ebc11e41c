"""CREST as a hook of a run: bills, shards, checkpoints and results of ``CrestAlgorithm``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.record import Recorder
from raypkg.data.augment import compose
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import Batch, Epoch, ahead, dtype_of, training_batch
from raypkg.engine.hooks import Hook, Results, Selected, hook
from raypkg.engine.run import Run
from raypkg.engine.shards import Shard, Shards, WorkerShards
from raypkg.engine.worker import Worker
from raypkg.experiments.samples import Samples
from raypkg.experiments.training import Job

from . import plots
from .algorithm import CrestAlgorithm
from .colm import Colm, check_kind
from .parallel import RunLoop
from .selection import Chosen, Pool
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
        if compose(run.augment).alternating:
            raise UserError("dataset.augment = altflip: CREST draws samples without regard to epochs: use flip")

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
        recorder = next(hook for hook in run.hooks if isinstance(hook, Recorder))
        difficulty = plots.difficulty_of_picks(picked, recorder.record.forgotten.numpy())  # type: ignore[union-attr]
        tables = {
            "crest": pa.Table.from_pylist(state.history),
            "minibatches": pa.table({"update": picked[0], "index": picked[1]}),
            "steps": pa.table({"index": self.indices.numpy(), "steps": steps}),
        }
        pictures: dict[str, Callable[[Path], None]] = {"minibatches": partial(plots.minibatches, difficulty, steps)}
        if self.options.tau:
            found = f"CREST chose {state.pool.update} pools of mini-batch coresets: see plots/regions.png"
            pictures["regions"] = partial(plots.checks, state.history, self.options.tau)
        else:
            found = f"CREST chose a mini-batch coreset for each of {state.pool.update} steps: see plots/minibatches.png"
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

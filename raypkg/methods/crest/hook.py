"""CREST as a hook of a run: batches, bills, checkpoints and results of ``CrestAlgorithm``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import whole_steps
from raypkg.data.augment import compose
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import Batch, Epoch, ahead, dtype_of, plain_batches, training_batch
from raypkg.engine.loop import autocast
from raypkg.engine.run import Hook, Results, Run, Selected, hook
from raypkg.experiments.samples import Samples
from raypkg.experiments.training import Job

from . import plots
from .algorithm import CrestAlgorithm, Loop
from .colm import Colm, check_kind
from .quadratic import Derive, trains_as_it_evaluates
from .selection import Chosen, Pool, Subset
from .settings import CrestOptions

DEFAULTS = CrestOptions()
BATCH_NORM = (
    "CREST loses most of its gain with batch norm, whose statistics of medoids are not those of the data: use group"
    " norm or frozen statistics (for the built-in resnets --set model.options.norm=group, or =frozen)"
)
log = logging.getLogger(__name__)


class Crest(Hook):
    """Training on mini-batch coresets (CREST, arXiv:2306.01244), as ``CrestAlgorithm`` chooses them.

    It trains on batches of ``size`` = m out of the samples ``indices``, int64 [n], which every worker reaches.
    """

    priority = 0

    def __init__(self, options: CrestOptions, indices: Tensor, size: int):
        self.options = options
        self.indices = indices
        self.steps = -(-len(indices) // size)  # per epoch, as on all samples
        self.loop = RunLoop()
        self.loop.size = size
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
        loop = self.loop
        loop.run, loop.model, loop.seed, loop.worker, loop.augment = run, run.model, run.seed, run.worker, run.augment
        loop.at_once = run.settings.at_once
        loop.steps = whole_steps(run.length or run.settings.epochs, self.steps)
        loop.gives_gradients = trains_as_it_evaluates(run.model)
        self.algorithm.step = run.step
        return Epoch(self.steps, self._loaded(run, min(run.step + self.steps, loop.steps)))

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
def crest(*, job: Job, samples: Samples, options: CrestOptions = DEFAULTS) -> Crest:
    """Train on mini-batch coresets, renewed at every step or when a local model of the loss expires."""
    options.check(job.samples_used(samples), job.training, job.experiment)
    return Crest(options, samples.train_indices, job.training.batch_size)


class RunLoop(Loop):
    """A run's training loop, whose passes the training workers share and bill."""

    run: Run

    def batches(
        self, subset: Subset, part: str, size: int | None = None, *, backward: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x, y) of samples, augmented as they are trained on."""
        run, bill = self.run, self.run.bill(part)
        split, positions = subset.split(run.split, self.augment), torch.arange(len(subset))
        for x, y in plain_batches(split, positions, run.worker.device, size, dtype_of(run.model)):
            bill.forward += len(y)
            bill.backward += len(y) * backward
            yield x, y

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context of the run's precision."""
        return autocast(self.run.settings.precision, self.run.worker.device)

    @contextmanager
    def passing(self, part: str) -> Iterator[None]:
        """Bill the passes inside the block."""
        with self.run.cost.apart(self.run.bill(part)), super().passing(part):
            yield

    def derivative(self, derive: Derive, parameters: Sequence[Tensor], samples: Subset, weights: Tensor) -> Tensor:
        """Return a derivative of the mean of w · loss, and bill its sum over the workers, [p]."""
        total = super().derivative(derive, parameters, samples, weights)
        self.run.bill("model").sent += total.nbytes * (self.worker.world > 1)
        return total

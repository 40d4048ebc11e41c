"""Training on mini-batch coresets (CREST), which the training workers or actors of their own choose."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from raypkg.cluster.actors import actors
from raypkg.core.errors import UserError
from raypkg.core.settings import Model
from raypkg.coresets.sharded import LiveModel, SentModel
from raypkg.data.coreset import Coreset
from raypkg.engine.run import Hook
from raypkg.engine.shards import FirstWorkerShards, Shard, Shards, WorkerShards
from raypkg.engine.worker import Worker
from raypkg.phases.coreset_files import origin, record_of, save_coreset
from raypkg.phases.samples import Samples, samples
from raypkg.phases.training import MODEL, Job, train_model
from raypkg.runs.plots import save_plot
from raypkg.runs.storage import Storage

from . import plots
from .hook import Crest
from .pool import subset_size
from .settings import CrestSelect

CHECKS, PICKED, STEPS = "crest.parquet", "minibatches.parquet", "steps.parquet"


def check_crest(settings: Any, epochs: int, n: int) -> None:
    """Refuse, before any work, a batch, subset or warm-up that the data or the budget cannot hold.

    Args:
        settings: of the experiment.
        epochs: of the compressed training.
        n: training samples.
    """
    train = settings.train
    subset_size(settings.select, n, train.batch_size)
    steps = epochs * -(-n // train.batch_size)
    if 0 < train.warmup * steps < 1:
        raise UserError(f"train.warmup = {train.warmup:g} of the budget's {steps} steps is less than one step")
    if settings.select.actors and not settings.cluster.workers:
        raise UserError(
            f"select.actors = {settings.select.actors}: give cluster.workers too, 1 or more, so that both fit"
        )


def train_crest(worker: Worker, job: Job, hooks: Sequence[Hook] = ()) -> dict[str, Any]:
    """Train on all workers, with further hooks, and keep what CREST's checks and choices were."""
    settings: CrestSelect = job.experiment.select  # type: ignore[attr-defined]
    found = samples(job.experiment.dataset, job.experiment.seed)
    with _choosing(worker, job, found, settings) as (shards, scorer):
        hook = Crest(settings, shards, scorer, found.kept, job.training.batch_size)
        record = train_model(worker, job, [hook, *hooks])
    if worker.rank == 0:
        storage, split = job.storage, found.data.train
        storage.write_table(CHECKS, pa.Table.from_pylist(hook.history))
        picked: Tensor = torch.cat(hook.picked, dim=1)  # [2, ·]
        storage.write_table(PICKED, pa.table({"update": picked[0].numpy(), "index": picked[1].numpy()}))
        steps = hook.counts[found.kept]
        storage.write_table(STEPS, pa.table({"index": found.kept.numpy(), "steps": steps.numpy()}))
        used = hook.counts.nonzero()[:, 0]
        weights = hook.counts[used] / hook.counts[used].float().mean()
        facts = {**origin(job.experiment), "method": "crest", **settings.model_dump()}
        save_coreset(storage, Coreset(used, weights), split, facts)
    return {**record, "pools": hook.updates}


def draw_regions(storage: Storage, settings: CrestSelect) -> None:
    """Draw what the checks found and what was picked, into the folder of a run whose training is done."""
    checks, picked, steps, record = (storage.read_table(file) for file in (CHECKS, PICKED, STEPS, record_of(MODEL)))
    assert checks and picked and steps and record  # written by the training that is done, which began with a check
    save_plot(storage, "regions", lambda path: plots.regions(checks.to_pylist(), settings.tau, path))
    forgotten = record["forgotten"].to_numpy()[picked["index"].to_numpy()]  # ∞ = never learned
    known, updates = np.isfinite(forgotten), picked["update"].to_numpy() - 1
    sums, counts = (np.bincount(updates[known], part, updates.max() + 1) for part in (forgotten[known], None))
    with np.errstate(invalid="ignore"):
        difficulty = sums / counts  # [pools]
    save_plot(storage, "minibatches", lambda path: plots.minibatches(difficulty, steps["steps"].to_numpy(), path))


@contextmanager
def _choosing(worker: Worker, job: Job, found: Samples, settings: CrestSelect) -> Iterator[tuple[Shards, Any]]:
    """Give who chooses, the training workers or actors, and the form in which they take a model."""
    source, precision = job.experiment.dataset, job.training.precision
    if not settings.actors:
        shards = [
            Shard(found.data, found.kept, found.valid, worker.device, rank, worker.world)
            for rank in range(worker.world)
        ]
        yield WorkerShards(shards, worker), partial(LiveModel, precision=precision)
        return
    held = [Shard(source, found.kept, found.valid, rank=rank, world=settings.actors) for rank in range(settings.actors)]
    split = found.data.train
    scorer = partial(_sent, job.experiment.model, split.shape, split.num_classes, precision)
    with actors(held, job.experiment.cluster, worker.rank == 0) as mine:
        yield FirstWorkerShards(mine, worker), scorer


def _sent(settings: Model, shape: tuple[int, ...], num_classes: int, precision: str, model: nn.Module) -> SentModel:
    parameters = {name: value.cpu().numpy() for name, value in model.state_dict().items()}
    return SentModel(settings, shape, num_classes, parameters, precision)

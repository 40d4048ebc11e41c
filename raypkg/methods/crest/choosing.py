"""Who chooses mini-batch coresets: the training workers, or actors of their own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from raypkg.cluster.actors import actors
from raypkg.core.settings import Model
from raypkg.coresets.sharded import LiveModel, Scorer, SentModel
from raypkg.engine.shards import FirstWorkerShards, Shard, Shards, WorkerShards
from raypkg.engine.worker import Worker
from raypkg.phases.samples import Samples
from raypkg.phases.training import Job

from .settings import CrestOptions

Form = Callable[[nn.Module], Scorer]  # brings a model into the form that shards take


@contextmanager
def choosing(worker: Worker, job: Job, samples: Samples, options: CrestOptions) -> Iterator[tuple[Shards, Form]]:
    """Give who chooses, each with all samples, and the form in which they take a model, until the block ends."""
    precision = job.training.precision
    if not options.actors:
        everyone = [
            Shard(samples.data, samples.kept, samples.valid, worker.device, rank, worker.world)
            for rank in range(worker.world)
        ]
        yield WorkerShards(everyone, worker), partial(LiveModel, precision=precision)
        return
    held = [
        Shard(job.experiment.dataset, samples.kept, samples.valid, rank=rank, world=options.actors)
        for rank in range(options.actors)
    ]
    split = samples.data.train
    form = partial(_sent, job.experiment.model, split.shape, split.num_classes, precision)
    with actors(held, job.experiment.cluster, worker.rank == 0) as mine:
        yield FirstWorkerShards(mine, worker), form


def _sent(settings: Model, shape: tuple[int, ...], num_classes: int, precision: str, model: nn.Module) -> SentModel:
    parameters = {name: value.cpu().numpy() for name, value in model.state_dict().items()}
    return SentModel(settings, shape, num_classes, parameters, precision)

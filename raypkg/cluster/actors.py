"""Shards held by Ray actors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch

from raypkg.core.errors import UserError
from raypkg.core.settings import Cluster
from raypkg.engine.shards import Shard, Shards, WorkerShards
from raypkg.engine.worker import threads

from .session import Plan, cluster_errors, connect, plan


class RayShards(Shards):
    """One actor per shard; a killed actor is restarted and repeats its call with the driver's copy of the shard."""

    def __init__(self, shards: Sequence[Shard], size: Plan, max_failures: int):
        import ray

        actor = ray.remote(Holder).options(
            num_cpus=size.cpus,
            num_gpus=size.gpus,
            max_restarts=max_failures,
            max_task_retries=max_failures,
            scheduling_strategy="DEFAULT",  # a trial of Ray Tune would keep them in its own resources
        )
        # Not a constructor argument: a restarted actor may find those gone from the object store.
        self._shards = [ray.put(shard.portable()) for shard in shards]
        self._actors = [actor.remote(size.cpus) for _ in shards]

    def map(self, function: Callable[..., Any], *broadcast: Any) -> list[Any]:
        """Return ``function(shard, *broadcast)`` of every shard, or its ``UserError``; arguments are stored once."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        shared = [ray.put(value) for value in broadcast]
        pairs = zip(self._actors, self._shards, strict=True)
        calls = [actor.apply.remote(function, shard, *shared) for actor, shard in pairs]
        try:
            return ray.get(calls)
        except RayActorError as error:
            raise UserError(f"a shard's actor died too often (cluster.max_failures): {error}") from error
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise

    def close(self) -> None:
        """End the actors and free what they hold."""
        import ray

        for actor in self._actors:
            ray.kill(actor)


class Holder:
    """An actor, which applies functions to its shard; the shard comes with every call and is opened at the first."""

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        self._opened: Shard | None = None

    def apply(self, function: Callable[..., Any], shard: Shard, *broadcast: Any) -> Any:
        """Return the function's value on the shard, computed on the actor's device."""
        import ray

        if self._opened is None:
            device = "cuda" if ray.get_gpu_ids() else "cpu"
            self._opened = replace(shard, device=torch.device(device))
        return function(self._opened, *broadcast)


@contextmanager
def hold(split: Callable[[int], Sequence[Shard]], cluster: Cluster) -> Iterator[Shards]:
    """Hold the shards that ``split`` returns for a number of holders on actors, or in this process without workers."""
    if cluster.workers == 0:
        with threads(cluster.cpus_without_gpu):
            yield WorkerShards(split(1))
        return
    connect(cluster)
    size = plan(cluster)
    with cluster_errors(), closing(RayShards(split(size.workers), size, cluster.max_failures)) as remote:
        yield remote

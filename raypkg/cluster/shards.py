"""Shards held by Ray actors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from raypkg.core.errors import UserError
from raypkg.core.settings import Cluster
from raypkg.engine.shards import LocalShards, Shard, Shards
from raypkg.engine.worker import threads

if TYPE_CHECKING:
    from .session import Plan


class RayShards:
    """One actor per shard; a killed actor is restarted, opens its shard again and repeats its call.

    Args:
        shards: what the actors hold; a shard is rebuilt from paths and indices, never from memory.
        size: what an actor asks Ray for.
        max_failures: how often an actor may die.
    """

    def __init__(self, shards: Sequence[Shard], size: "Plan", max_failures: int):
        import ray

        actor = ray.remote(Holder).options(
            num_cpus=size.cpus, num_gpus=size.gpus, max_restarts=max_failures, max_task_retries=max_failures
        )
        self._actors = [actor.remote(shard, size.cpus) for shard in shards]

    def map(self, function: Callable[..., Any], *broadcast: Any) -> list[Any]:
        """Return ``function(shard, *broadcast)`` of every shard; arguments go to the object store once.

        Raises:
            UserError: raised by the function, or an actor died more often than allowed.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        references = [ray.put(value) for value in broadcast]
        try:
            return ray.get([actor.apply.remote(function, *references) for actor in self._actors])
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
    """What runs inside an actor: a shard and the means to apply functions to it."""

    def __init__(self, shard: Shard, threads: int):
        import ray

        torch.set_num_threads(threads)
        self.shard = replace(shard, device=torch.device("cuda" if ray.get_gpu_ids() else "cpu"))

    def apply(self, function: Callable[..., Any], *broadcast: Any) -> Any:
        """Return the function's value on the shard."""
        return function(self.shard, *broadcast)


@contextmanager
def hold(split: Callable[[int], Sequence[Shard]], cluster: Cluster) -> Iterator[Shards]:
    """Hold shards on actors, or in this process when ``cluster.workers`` is 0, until the block ends.

    Args:
        split: makes the shards for at most so many holders.
        cluster: how many holders, and their size.
    """
    if cluster.workers == 0:
        with threads(cluster.cpus_per_worker):
            yield LocalShards(split(1))
        return
    from .session import connect, plan

    connect(cluster)
    size = plan(cluster)
    shards = RayShards(split(size.workers), size, cluster.max_failures)
    try:
        yield shards
    finally:
        shards.close()

"""Data split over holders: the same pure functions run on shards in this process, in training workers or on actors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from raypkg.core.settings import Dataset
from raypkg.data import Data, load_data

from .worker import Worker


@dataclass(frozen=True)
class Shard:
    """The samples of one holder, opened on first use: cheap to send, rebuilt from durable inputs after a death.

    Attributes:
        source: where the samples are, or the open data set for a shard that stays in its process.
        indices: int64 [n], positions in the training split.
        valid: int64 [v], positions of held-out samples, also in the training split.
        device: where the holder computes.
    """

    source: Dataset | Data
    indices: Tensor
    valid: Tensor
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def data(self) -> Data:
        """The data set, memory-mapped."""
        if isinstance(self.source, Dataset):
            return load_data(self.source.name, self.source.options)
        return self.source


class Shards(Protocol):
    """Data split over holders; methods see only this."""

    def map(self, function: Callable[..., Any], *broadcast: Any) -> list[Any]:
        """Return ``function(shard, *broadcast)`` of every shard, in the order of the shards."""


class LocalShards:
    """Shards in this process, visited one after another."""

    def __init__(self, shards: Sequence[Shard]):
        self.shards = shards

    def map(self, function: Callable[..., Any], *broadcast: Any) -> list[Any]:
        """Return ``function(shard, *broadcast)`` of every shard."""
        return [function(shard, *broadcast) for shard in self.shards]


class WorkerShards:
    """Shards of the workers of a training group, the one of rank r held by worker r; all call ``map`` together."""

    def __init__(self, shards: Sequence[Shard], worker: Worker):
        self.mine, self.worker = shards[worker.rank : worker.rank + 1], worker

    def map(self, function: Callable[..., Any], *broadcast: Any) -> list[Any]:
        """Return ``function(shard, *broadcast)`` of every shard to every worker."""
        parts = self.worker.gather([function(shard, *broadcast) for shard in self.mine])
        return [result for part in parts for result in part]


def class_shards(
    source: Dataset | Data,
    y: Tensor,
    indices: Tensor,
    valid: Tensor,
    count: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
) -> list[Shard]:
    """Split samples by class into at most ``count`` shards of about equal size; a class is never divided.

    Args:
        source: where the samples are.
        y: labels of the whole training split, int64.
        indices: the training samples to split.
        valid: held-out samples, given to the shard of their class.
        count: holders.
        device: where the holders compute.
    """
    owner = torch.zeros(int(y.max()) + 1, dtype=torch.int64)
    sizes = torch.bincount(y[indices], minlength=len(owner))
    load = torch.zeros(min(count, int((sizes > 0).sum())), dtype=torch.int64)
    for label in sizes.argsort(descending=True, stable=True).tolist():
        owner[label] = load.argmin()
        load[owner[label]] += sizes[label]
    return [
        Shard(source, indices[owner[y[indices]] == holder], valid[owner[y[valid]] == holder], device)
        for holder in range(len(load))
    ]

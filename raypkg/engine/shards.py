"""Data split over holders: the same pure functions run on shards in this process or on actors that own them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from raypkg.core.settings import Dataset
from raypkg.data import Data, load_data


@dataclass(frozen=True)
class Shard:
    """The samples of one holder, opened on first use: cheap to send, rebuilt from durable inputs after a death.

    Attributes:
        dataset: where the samples are.
        indices: int64 [n], positions in the training split.
        valid: int64 [v], positions of held-out samples, also in the training split.
        device: where the holder computes.
    """

    dataset: Dataset
    indices: Tensor
    valid: Tensor
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def data(self) -> Data:
        """The data set, memory-mapped."""
        return load_data(self.dataset.name, self.dataset.options)


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


def class_shards(dataset: Dataset, y: Tensor, indices: Tensor, valid: Tensor, count: int) -> list[Shard]:
    """Split samples by class into at most ``count`` shards of about equal size; a class is never divided.

    Args:
        dataset: where the samples are.
        y: labels of the whole training split, int64.
        indices: the training samples to split.
        valid: held-out samples, given to the shard of their class.
        count: holders.
    """
    owner = torch.zeros(int(y.max()) + 1, dtype=torch.int64)
    sizes = torch.bincount(y[indices], minlength=len(owner))
    load = torch.zeros(min(count, int((sizes > 0).sum())), dtype=torch.int64)
    for label in sizes.argsort(descending=True, stable=True).tolist():
        owner[label] = load.argmin()
        load[owner[label]] += sizes[label]
    return [
        Shard(dataset, indices[owner[y[indices]] == holder], valid[owner[y[valid]] == holder])
        for holder in range(len(load))
    ]

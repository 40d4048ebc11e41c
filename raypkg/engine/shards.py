"""Data split over holders, on which the same pure functions run in this process, in training workers or on actors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from raypkg.core.settings import Dataset
from raypkg.data import Data
from raypkg.data.opening import open_data
from raypkg.data.split import Split, at_hand, with_values

from .worker import Worker


@dataclass(frozen=True)
class Shard:
    """The samples of one holder, opened on first use: cheap to send, and rebuilt from durable inputs after a death."""

    source: Dataset | Data  # settings of the data set, or the open one for a shard that stays in its process
    indices: Tensor  # int64 [n], positions in the training split
    valid: Tensor  # int64 [v], positions of held-out samples in the training split
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # of the holder
    rank: int = 0  # of the holder among ``world``, for work that any of them can do
    world: int = 1

    @cached_property
    def data(self) -> Data:
        """The data set, memory-mapped."""
        if isinstance(self.source, Dataset):
            return open_data(self.source)
        return self.source

    @cached_property
    def train(self) -> Split:
        """The training split; of one read by blocks, the shard's samples copied to this machine."""
        own = torch.cat([self.indices, self.valid])
        return at_hand(self.data.train, own)

    def portable(self) -> "Shard":
        """Return the shard in a form that any machine can open: with the values of an open data set."""
        if isinstance(self.source, Dataset):
            return self
        train, test = self.source
        own = torch.cat([self.indices, self.valid])
        data = Data(with_values(train, own), with_values(test, torch.arange(0)))
        return replace(self, source=data)


class Shards(Protocol):
    """Data split over holders; methods see only this interface."""

    def map(self, function: Callable[..., Any], *broadcast: Any) -> list[Any]:
        """Return ``function(shard, *broadcast)`` of every shard, in the order of the shards."""


class WorkerShards:
    """Shards of the workers of a training group, shard r on worker r, or all of them in this process, in turn.

    All workers call ``map`` together.
    """

    def __init__(self, shards: Sequence[Shard], worker: Worker | None = None):
        self.worker = worker or Worker()
        self._mine = shards[self.worker.rank :: self.worker.world]  # none for the workers beyond the last shard

    def map(self, function: Callable[..., Any], *broadcast: Any) -> list[Any]:
        """Return ``function(shard, *broadcast)`` of every shard to every worker."""
        everyone = self.worker.gather([function(shard, *broadcast) for shard in self._mine])
        return [result for each in everyone for result in each]


def class_shards(
    source: Dataset | Data,
    y: Tensor,
    indices: Tensor,
    valid: Tensor,
    count: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
) -> list[Shard]:
    """Split samples by class into at most ``count`` shards of about equal size; a class is never divided.

    ``y`` are the labels of the whole training split. The held-out samples ``valid`` go to the shard of their class.
    """
    # The largest class first, each to the holder with the fewest samples so far.
    owner = torch.zeros(int(y.max()) + 1, dtype=torch.int64)  # [C]
    sizes = torch.bincount(y[indices], minlength=len(owner))  # [C]
    load = torch.zeros(min(count, int((sizes > 0).sum())), dtype=torch.int64)
    for label in sizes.argsort(descending=True, stable=True).tolist():
        owner[label] = load.argmin()
        load[owner[label]] += sizes[label]
    of_train = owner[y[indices]]  # [n]
    of_valid = owner[y[valid]]  # [v]
    world = int(owner.max()) + 1
    return [
        Shard(source, indices[of_train == rank], valid[of_valid == rank], device, rank, world) for rank in range(world)
    ]

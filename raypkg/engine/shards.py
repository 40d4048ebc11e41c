"""Data split over holders: the same pure functions run on shards in this process, in training workers or on actors."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    """The samples of one holder, opened on first use: cheap to send, rebuilt from durable inputs after a death.

    Attributes:
        source: where the samples are, or the open data set for a shard that stays in its process.
        indices: int64 [n], positions in the training split.
        valid: int64 [v], positions of held-out samples, also in the training split.
        device: where the holder computes.
        rank: of the holder among ``world``, for work that any of them can do.
    """

    source: Dataset | Data
    indices: Tensor
    valid: Tensor
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1

    @cached_property
    def data(self) -> Data:
        """The data set, memory-mapped."""
        if isinstance(self.source, Dataset):
            return open_data(self.source)
        return self.source

    @cached_property
    def train(self) -> Split:
        """The training split; of one that is read by blocks the shard's samples, copied to this machine."""
        own = torch.cat([self.indices, self.valid])
        return at_hand(self.data.train, own)

    def portable(self) -> "Shard":
        """Return the shard as any machine can open it: with the values of an open data set, whose files are here."""
        if isinstance(self.source, Dataset):
            return self
        train, test = self.source
        own = torch.cat([self.indices, self.valid])
        data = Data(with_values(train, own), with_values(test, torch.arange(0)))
        return replace(self, source=data)


Pending = Callable[[], list[Any]]  # waits for them


class Shards(Protocol):
    """Data split over holders; methods see only this."""

    def map(self, function: Callable[..., Any], *broadcast: Any) -> list[Any]:
        """Return ``function(shard, *broadcast)`` of every shard, in the order of the shards."""

    def start(self, function: Callable[..., Any], *broadcast: Any) -> Pending:
        """Begin a ``map`` and return at once; calling what is returned waits for the results."""


class LocalShards:
    """Shards in this process, visited one after another."""

    def __init__(self, shards: Sequence[Shard]):
        self.shards = shards
        self._thread = ThreadPoolExecutor(1, "shards")

    def map(self, function: Callable[..., Any], *broadcast: Any) -> list[Any]:
        """Return ``function(shard, *broadcast)`` of every shard."""
        return [function(shard, *broadcast) for shard in self.shards]

    def start(self, function: Callable[..., Any], *broadcast: Any) -> Pending:
        """Begin a ``map`` in a thread."""
        return self._thread.submit(self.map, function, *broadcast).result


class WorkerShards:
    """Shards of the workers of a training group, the one of rank r held by worker r; all call ``map`` together."""

    def __init__(self, shards: Sequence[Shard], worker: Worker):
        mine = shards[worker.rank : worker.rank + 1]  # none for the workers beyond the last shard
        self._mine = LocalShards(mine)
        self.worker = worker

    def map(self, function: Callable[..., Any], *broadcast: Any) -> list[Any]:
        """Return ``function(shard, *broadcast)`` of every shard to every worker."""
        results = self._mine.map(function, *broadcast)
        return self._gathered(results)

    def start(self, function: Callable[..., Any], *broadcast: Any) -> Pending:
        """Begin a ``map`` in a thread of each worker; all ask for the results together."""
        pending = self._mine.start(function, *broadcast)
        return lambda: self._gathered(pending())

    def _gathered(self, results: list[Any]) -> list[Any]:
        everyone = self.worker.gather(results)
        return [result for each in everyone for result in each]


class FirstWorkerShards:
    """Shards that the worker of rank 0 alone reaches, such as actors; all workers ask for the results together."""

    def __init__(self, shards: Shards | None, worker: Worker):
        self._shards = shards
        self.worker = worker

    def map(self, function: Callable[..., Any], *broadcast: Any) -> list[Any]:
        """Return ``function(shard, *broadcast)`` of every shard to every worker."""
        pending = self.start(function, *broadcast)
        return pending()

    def start(self, function: Callable[..., Any], *broadcast: Any) -> Pending:
        """Begin a ``map`` from rank 0."""
        pending = self._shards.start(function, *broadcast) if self._shards else list
        return lambda: self.worker.first(pending())


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
    owner = _owner_of_class(y, indices, count)  # [C]
    of_train = owner[y[indices]]  # [n]
    of_valid = owner[y[valid]]  # [v]
    world = int(owner.max()) + 1
    return [
        Shard(source, indices[of_train == rank], valid[of_valid == rank], device, rank, world) for rank in range(world)
    ]


def _owner_of_class(y: Tensor, indices: Tensor, count: int) -> Tensor:
    """Return which holder each class belongs to, int64 [C]: the largest first, each to whoever has least so far."""
    owner = torch.zeros(int(y.max()) + 1, dtype=torch.int64)
    sizes = torch.bincount(y[indices], minlength=len(owner))  # [C]
    holders = min(count, int((sizes > 0).sum()))
    load = torch.zeros(holders, dtype=torch.int64)
    for label in sizes.argsort(descending=True, stable=True).tolist():
        owner[label] = load.argmin()
        load[owner[label]] += sizes[label]
    return owner

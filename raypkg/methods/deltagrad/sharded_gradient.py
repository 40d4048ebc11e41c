"""Sums of gradients over samples that this process or Ray actors hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raypkg.cluster.actors import hold
from raypkg.core.settings import Cluster
from raypkg.data import Data
from raypkg.data.split import Split
from raypkg.engine.shards import Shard, Shards

from .objective import Objective

FEW = 2048  # samples that are faster computed here than asked of the holders


class ShardedGradient:
    """Σ ∇loss_i(w), the samples' gradients computed where they are held and added in the order of the shards.

    Args:
        objective: the loss.
        split: all samples.
        shards: hold them, in contiguous ranges.
        few: up to so many samples are computed in this process.

    Attributes:
        samples: whose gradients were computed so far.
    """

    def __init__(self, objective: Objective, split: Split, shards: Shards, few: int = FEW):
        self._objective = objective
        self._split = split
        self._shards = shards
        self._few = few
        self.samples = 0

    def __call__(self, w: Tensor, indices: Tensor) -> Tensor:
        """Return the sum over the indices, float64 [p]."""
        self.samples += len(indices)
        if len(indices) <= self._few:
            return self._objective.gradient_sum(self._split, w, indices)
        sums = self._shards.map(_sum_of_shard, self._objective, w, indices)
        return torch.stack(sums).sum(0)


@contextmanager
def sharded_gradient(objective: Objective, split: Split, test: Split, cluster: Cluster) -> Iterator[ShardedGradient]:
    """Hold a split's samples, in contiguous ranges, in this process or on actors, until the block ends.

    Of a split of few samples no actor would ever be asked, and none is started.

    Args:
        objective: the loss.
        split: the samples.
        test: the data set's test split, which a shard comes with.
        cluster: where they are held.
    """
    if len(split) <= FEW:
        cluster = cluster.model_copy(update={"workers": 0})
    data = Data(split, test)
    nobody = torch.arange(0)

    def ranges(count: int) -> list[Shard]:
        everyone = torch.arange(len(split))
        return [Shard(data, indices, nobody) for indices in everyone.tensor_split(count)]

    with hold(ranges, cluster) as shards:
        yield ShardedGradient(objective, split, shards)


def _sum_of_shard(shard: Shard, objective: Objective, w: Any, indices: Any) -> Tensor:
    held = (indices >= shard.indices[0]) & (indices <= shard.indices[-1])
    return objective.gradient_sum(shard.data.train, w, indices[held])

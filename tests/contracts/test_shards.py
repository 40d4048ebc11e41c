"""Every kind of Shards gives what a plain loop over the shards gives, at once."""

import pytest
import torch

from gloo import on_workers
from raypkg.core.errors import UserError
from raypkg.core.settings import Cluster
from raypkg.data import Data
from raypkg.data.split import Split
from raypkg.engine.shards import Shard, WorkerShards, class_shards

N, C = 60, 3


def held():
    """Return three shards of a split, a class each."""
    y = torch.arange(N) % C
    split = Split.from_tensors(torch.arange(2.0 * N).view(N, 2), y)
    return class_shards(Data(split, split), y, torch.arange(N), torch.arange(0), C)


def sums(shard: Shard, factor: float, scale: torch.Tensor):
    x, y = shard.data.train.batch(shard.indices)
    return shard.rank, y.unique().tolist(), (factor * scale * x).sum(0).tolist()


def refuse(shard: Shard):
    raise UserError(f"shard {shard.rank} refuses")


ARGUMENTS = 2.0, torch.tensor([1.0, 10.0])
EXPECTED = [sums(shard, *ARGUMENTS) for shard in held()]


def test_map():
    shards = WorkerShards(held())
    assert shards.map(sums, *ARGUMENTS) == EXPECTED
    with pytest.raises(UserError, match="shard 0 refuses"):
        shards.map(refuse)


def mapped(worker):
    """Return what shared shards give one of two workers."""
    return WorkerShards(held()[: worker.world], worker).map(sums, *ARGUMENTS)


@pytest.mark.slow
def test_two_workers_get_every_result():
    assert on_workers(2, mapped) == [EXPECTED[:2]] * 2


@pytest.mark.ray
def test_actors(ray):
    from raypkg.cluster.actors import hold

    with hold(lambda count: held()[:count], Cluster(workers=3)) as shards:
        assert shards.map(sums, *ARGUMENTS) == EXPECTED
        with pytest.raises(UserError, match=r"shard \d refuses"):
            shards.map(refuse)

"""Workers as real processes that reach each other by gloo, without Ray."""

import atexit
import multiprocessing
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from raypkg.engine.worker import Worker


def on_workers(world, function, *arguments):
    """Return what ``function(worker, *arguments)`` returns on each of so many workers, in the order of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        places = [(rank, world, Path(folder, "store"), function, arguments) for rank in range(world)]
        results = [pool.apply_async(_worker, (place,)) for pool, place in zip(_processes(world), places, strict=True)]
        return [result.get() for result in results]


@cache
def _processes(world):
    """Start processes that stay for the next test: most of a short one's time is their import of PyTorch.

    A process keeps its rank, which PyTorch caches with the shares of tensors.
    """
    pools = [multiprocessing.get_context("spawn").Pool(1) for _ in range(world)]
    for pool in pools:
        atexit.register(pool.terminate)
    return pools


def _worker(place):
    rank, world, store, function, arguments = place
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        return function(Worker(rank, world), *arguments)
    finally:
        dist.destroy_process_group()

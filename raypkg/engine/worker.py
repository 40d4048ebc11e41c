"""A worker: its rank, its device, collectives with the other workers, and its memory."""

import ctypes
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raypkg.core.errors import UserError
from raypkg.core.memory import machine_memory
from raypkg.models.checkpointing import blocks_of

Row = Mapping[str, Any]  # one line of metrics: phase, epoch, loss, …

M_TRIM_THRESHOLD = -1  # glibc's malloc.h: free memory at the end of the heap from which on it goes back to the OS
M_MMAP_THRESHOLD = -3  # glibc's malloc.h: size from which on a block lies outside the heap
CPU = torch.device("cpu")
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes; glibc refuses more
NEVER = -1


@dataclass(frozen=True)
class Worker:
    """One of ``world`` processes that run the same function; alone, every collective is the identity."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Callable[[Row], None] = lambda row: None
    local: dict[str, Any] = field(default_factory=dict, compare=False)  # what functions keep in this process

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all workers (one all-reduce on the workers' device)."""
        if self.world == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of rank 0, such as running statistics of batch norm, which drift apart."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:
        """Return every worker's small picklable value, in the order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """Return rank 0's picklable value on every worker."""
        if self.world == 1:
            return value
        values = [value if self.rank == 0 else None]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def shard(self, model: nn.Module) -> None:
        """Share a model's parameters among the workers, block by block (FSDP2, arXiv:2304.11277).

        Raises:
            UserError: its parameters have several types.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if len(kinds := {str(parameter.dtype) for parameter in model.parameters()}) > 1:
            raise UserError(f"cluster.strategy = fsdp needs parameters of one type, not {' and '.join(sorted(kinds))}")
        model.state_dict()  # a language model then keeps the digest of its frozen weights, which are complete here only
        mesh = init_device_mesh(self.device.type, (self.world,))
        for part in (*blocks_of(model), model):
            fully_shard(part, mesh=mesh)

    def distribute(self, model: nn.Module) -> nn.Module:
        """Wrap a model so that its gradients are averaged over the workers (DDP)."""
        if self.world == 1:
            return model
        with warnings.catch_warnings():  # torch 2.15 renames broadcast_buffers, earlier ones know no other name
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,  # a collective every step; `share` does it where statistics are used
                gradient_as_bucket_view=True,
            )


def whole(value: Any) -> Any:
    """Return a tensor that is shared among workers complete (a collective), and so within a state; others as is."""
    if isinstance(value, Mapping):
        return {name: whole(part) for name, part in value.items()}
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def share_of(target: Tensor, value: Tensor) -> Tensor:
    """Return a complete tensor shared among the workers as ``target`` is, if it is; all workers have the tensor."""
    if not hasattr(target, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with this number of threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def keep_freed_memory() -> None:
    """Have glibc reuse freed memory instead of returning it to the OS.

    By default glibc returns a batch's activations and requests them again for the next batch, page by page: 5 to 20
    percent of the time of training and evaluation. The price: memory once used for batches stays with the process
    until ``forget_peak_memory``.
    """
    with suppress(AttributeError):  # other C libraries have no such function
        adjust = ctypes.CDLL(None).mallopt
        adjust(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)  # larger blocks always go back
        adjust(M_TRIM_THRESHOLD, NEVER)


class Buffers:
    """Memory of large batches on a CPU, which the next batches reuse once nothing refers to it.

    glibc returns blocks above 32 MiB to the OS. A new one is cleared page by page, which takes longer than filling it.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size <= LARGEST_MMAP_THRESHOLD:
            return torch.empty(shape, dtype=dtype, device=device)
        whole = None
        with suppress(IndexError):  # none is free; several threads may load
            whole = self._free.pop()
        if whole is None or len(whole) < size:
            whole = torch.empty(size, dtype=torch.uint8).numpy()
        # Every view of the tensor, unlike the tensor itself, keeps the array alive that it was made from.
        lent = whole[:size]
        weakref.finalize(lent, self._free.append, whole)
        return torch.from_numpy(lent).view(dtype).view(shape)


def forget_peak_memory() -> None:
    """Reset the peak-memory counter, first returning freed pages to the OS (glibc on Linux)."""
    with suppress(AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")


def memory_bound(memory: float | None, device: torch.device = CPU) -> int:
    """Return the bytes for caching: ``memory`` GiB, or a quarter of the memory of the device or worker if None."""
    if memory is not None:
        return int(memory * 2**30)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    mine = torch.get_num_threads()
    share = machine_memory() * mine // max(mine, os.cpu_count() or 1)  # as large as the worker's share of the CPUs
    return share // 4

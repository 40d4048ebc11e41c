"""A worker: its rank, its device, collectives with the other workers, its memory, and the bills of its work.

A device has modes of arithmetic, which a run restores, and a peak throughput.
"""

import ctypes
import math
import os
import re
import resource
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
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
from raypkg.core.settings import Training
from raypkg.models.operations import blocks_of

Row = Mapping[str, Any]  # one line of metrics: phase, epoch, loss, …

M_TRIM_THRESHOLD = -1  # glibc's malloc.h: free memory at the end of the heap from which on it goes back to the OS
M_MMAP_THRESHOLD = -3  # glibc's malloc.h: size from which on a block lies outside the heap
CPU = torch.device("cpu")
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes; glibc refuses more
NEVER = -1
_running = threading.local()
# Fields of which a joint bill has the largest value, for work in parallel and in turn; of the others it has the sum.
LARGEST_IN_TURN = ("memory", "device_memory", "peak")
LARGEST_IN_PARALLEL = (*LARGEST_IN_TURN, "seconds", "waited", "sent")
# 10¹² operations a second of dense products, by NVIDIA's data sheets: bfloat16, TF32, float32, float64. A name
# precedes those that it contains. Other devices, such as parts of a GPU (MIG), are unknown.
PEAKS = {
    r"H100 PCIe": (756, 378, 51, 51),
    r"H[12]00 NVL": (835, 417, 60, 60),
    r"H[12]00": (989, 494, 67, 67),
    r"A100": (312, 156, 19.5, 19.5),
    r"A10": (125, 62.5, 31.2, 0),
    r"L40S": (362, 183, 91.6, 0),
    r"L4": (121, 60, 30.3, 0),
}
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE = ":4096:8"  # with a workspace per stream cuBLAS sums in one order


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

    def interleaved(self, values: Iterable[Any]) -> list[Any]:
        """Return the values of all workers in order: worker r of W has the picklable values r, r + W, and so on."""
        everyone = self.gather(list(values))
        count = sum(map(len, everyone))
        return [everyone[number % self.world][number // self.world] for number in range(count)]

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


def computes_bfloat16(device: torch.device) -> bool:
    """Return True if the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def peak_of(device: torch.device, settings: Training) -> float:
    """Return a device's peak, operations a second in the precision of the settings; 0 if it is unknown.

    >>> peak_of(torch.device("cpu"), Training())
    0.0
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = next((peaks for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
    if peaks is None or "MIG" in name:
        return 0.0
    precision = settings.precision
    if precision == "auto":
        precision = "bfloat16" if computes_bfloat16(device) else "float32"
    kind = "tf32" if settings.tf32 else precision
    return 1e12 * peaks[("bfloat16", "tf32", "float32", "float64").index(kind)]


@contextmanager
def arithmetic(settings: Training, device: torch.device, *, fixed_shapes: bool) -> Iterator[None]:
    """Compute in the modes of the settings inside the block; restore those of the process.

    Raises:
        UserError: TF32 without a GPU that has it, or an operation without a deterministic form.
    """
    deterministic = settings.deterministic
    if settings.tf32 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError(f"train.tf32 = true: {device.type} has no TF32, a GPU of compute capability 8.0 or more has")
    cudnn = torch.backends.cudnn
    modes = [
        (torch.backends.cuda.matmul, "allow_tf32", settings.tf32),
        (cudnn, "allow_tf32", settings.tf32),
        (cudnn, "deterministic", deterministic),
        (cudnn, "benchmark", fixed_shapes and not deterministic),  # the fastest algorithm for each shape, by trials
    ]
    modes = modes if device.type == "cuda" else []
    before = [getattr(place, name) for place, name, _ in modes]
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(CUBLAS)
    try:
        for place, name, value in modes:
            setattr(place, name, value)
        if deterministic:
            os.environ.setdefault(CUBLAS, WORKSPACE)
            torch.use_deterministic_algorithms(True)
        yield
    except RuntimeError as error:  # PyTorch has no type for it
        if deterministic and "determinis" in str(error):
            raise UserError(f"train.deterministic = true: {str(error).partition('. ')[0]}") from error
        raise
    finally:
        for (place, name, _), value in zip(modes, before, strict=True):
            setattr(place, name, value)
        if deterministic:  # PyTorch imports its compiler to change the mode
            torch.use_deterministic_algorithms(was_deterministic, warn_only=only_warns)
            if workspace is None:
                os.environ.pop(CUBLAS)


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


@dataclass
class Cost:
    """The bill of one phase on one worker, or (after ``gathered``) on all workers."""

    phase: str
    forward: int = 0  # samples that passed through a model
    backward: int = 0  # samples whose gradient was computed
    seconds: float = 0.0  # on the critical path, that of the slowest worker
    total_seconds: float = 0.0  # summed over the workers
    memory: int = 0  # peak resident bytes of one worker
    sent: int = 0  # bytes that each worker handed to collectives
    device_memory: int = 0  # peak bytes that PyTorch allocated on one worker's GPU; 0 without one
    waited: float = 0.0  # seconds without a batch to compute with, on the worker that waited longest
    operations: float = 0.0  # of training steps on a GPU of known peak
    peak: float = 0.0  # operations a second, of one worker's GPU

    def __enter__(self) -> "Cost":
        self._start = time.perf_counter()
        _bills().append(self)
        return self

    def __exit__(self, *_: object) -> None:
        elapsed = time.perf_counter() - self._start
        _bills().pop()
        self.seconds += elapsed
        self.total_seconds += elapsed
        self.memory = max(self.memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        if torch.cuda.is_initialized():
            self.device_memory = max(self.device_memory, torch.cuda.max_memory_allocated())

    @contextmanager
    def apart(self, part: "Cost") -> Iterator[None]:
        """Bill a block inside a block of this bill to ``part`` instead."""
        before = part.seconds
        with part:
            yield
        self.seconds -= part.seconds - before
        self.total_seconds -= part.seconds - before

    def then(self, other: "Cost") -> "Cost":
        """Return the bill of this work followed by other work on the same worker."""
        return Cost.joined(self.phase, [self, other], LARGEST_IN_TURN)

    def gathered(self, worker: Worker) -> "Cost":
        """Return the bill over all workers: sums of work, maxima of seconds and memory."""
        return Cost.joined(self.phase, worker.gather(self))

    @staticmethod
    def joined(phase: str, costs: Sequence["Cost"], largest: Collection[str] = LARGEST_IN_PARALLEL) -> "Cost":
        """Return one bill for several, by default for work done in parallel."""
        joint = Cost(phase)
        for each in fields(Cost)[1:]:  # all but the phase
            values = [getattr(cost, each.name) for cost in costs]
            setattr(joint, each.name, max(values) if each.name in largest else sum(values))
        return joint

    def record(self) -> dict[str, Any]:
        """Return the bill as plain numbers for the run folder; those of a known GPU only where there is one."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("operations", "peak")}


@contextmanager
def waiting() -> Iterator[None]:
    """Bill the seconds of a block as waiting for a batch to the innermost running bill, if any."""
    start = time.perf_counter()
    yield
    if _bills():
        _bills()[-1].waited += time.perf_counter() - start


def _bills() -> list[Cost]:
    """Return the bills of the blocks that this thread is in, the innermost last."""
    bills: list[Cost] = vars(_running).setdefault("bills", [])
    return bills

"""Costs of a phase: samples forward and backward, seconds, memory and bytes sent."""

import resource
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from .worker import Worker

# Fields of which a joint bill has the largest value, for work in parallel and in turn; of the others it has the sum.
LARGEST_IN_TURN = ("memory", "device_memory", "peak")
LARGEST_IN_PARALLEL = (*LARGEST_IN_TURN, "seconds", "waited", "sent")


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
        _running.bills.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        elapsed = time.perf_counter() - self._start
        _running.bills.pop()
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
        for field in fields(Cost)[1:]:  # all but the phase
            values = [getattr(cost, field.name) for cost in costs]
            setattr(joint, field.name, max(values) if field.name in largest else sum(values))
        return joint

    def record(self) -> dict[str, Any]:
        """Return the bill as plain numbers for the run folder; those of a known GPU only where there is one."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("operations", "peak")}


class _Running(threading.local):
    """The bills of the blocks that a thread is in, the innermost last."""

    def __init__(self) -> None:
        self.bills: list[Cost] = []


_running = _Running()


@contextmanager
def waiting() -> Iterator[None]:
    """Bill the seconds of a block as waiting for a batch to the innermost running bill, if any."""
    start = time.perf_counter()
    yield
    if _running.bills:
        _running.bills[-1].waited += time.perf_counter() - start

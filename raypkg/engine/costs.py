"""Costs of a phase: samples forward and backward, seconds, memory and bytes sent."""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from .worker import Worker, peak_device_memory, peak_memory


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

    def __enter__(self) -> "Cost":
        self._start = time.perf_counter()
        _running.bills.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        elapsed = time.perf_counter() - self._start
        _running.bills.pop()
        self.seconds += elapsed
        self.total_seconds += elapsed
        self.memory = max(self.memory, peak_memory())
        self.device_memory = max(self.device_memory, peak_device_memory())

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
        return Cost(
            self.phase,
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            seconds=self.seconds + other.seconds,
            total_seconds=self.total_seconds + other.total_seconds,
            waited=self.waited + other.waited,
            memory=max(self.memory, other.memory),
            device_memory=max(self.device_memory, other.device_memory),
            sent=self.sent + other.sent,
        )

    def gathered(self, worker: Worker) -> "Cost":
        """Return the bill over all workers: sums of work, maxima of seconds and memory."""
        return Cost.joined(self.phase, worker.gather(self))

    @staticmethod
    def joined(phase: str, parallel: Iterable["Cost"]) -> "Cost":
        """Return one bill for work done in parallel."""
        costs = list(parallel)
        return Cost(
            phase,
            forward=sum(c.forward for c in costs),
            backward=sum(c.backward for c in costs),
            seconds=max(c.seconds for c in costs),
            total_seconds=sum(c.total_seconds for c in costs),
            waited=max(c.waited for c in costs),
            memory=max(c.memory for c in costs),
            device_memory=max(c.device_memory for c in costs),
            sent=max(c.sent for c in costs),
        )

    def record(self) -> dict[str, Any]:
        """Return the bill as plain numbers for the run folder."""
        return asdict(self)


class _Running(threading.local):
    """The bills of the blocks that a thread is in, the innermost last."""

    def __init__(self) -> None:
        self.bills: list[Cost] = []


_running = _Running()


@contextmanager
def waiting() -> Iterator[None]:
    """Bill the seconds of a block as waiting for a batch to the innermost running bill, if any.

    >>> with Cost("train") as cost, waiting():
    ...     time.sleep(0.01)
    >>> 0 < cost.waited < cost.seconds
    True
    """
    start = time.perf_counter()
    yield
    if _running.bills:
        _running.bills[-1].waited += time.perf_counter() - start

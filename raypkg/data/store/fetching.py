"""Reading many things at once, in order: what a disk or a server takes to answer is waited for once, not each time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

J = TypeVar("J")
T = TypeVar("T")

READERS = 16  # requests at once


def fetched(load: Callable[[J], T], jobs: Iterable[J], readers: int = READERS) -> Iterator[T]:
    """Yield ``load(job)`` in the order of the jobs, while threads work on the next ones, each on one.

    >>> list(fetched(abs, [3, -1, 2]))
    [3, 1, 2]
    """
    pool = ThreadPoolExecutor(readers, "fetching")
    pending: deque[Future[T]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(load, job))
            if len(pending) > readers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # Nobody wants the others any more. Not waited for: what is left half-read may be ended by Python's collector,
        # which runs in any thread, even in one that is just being started and cannot wait for another.
        pool.shutdown(wait=False, cancel_futures=True)

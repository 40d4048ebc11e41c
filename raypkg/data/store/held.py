"""Blocks in memory: those used last, each fetched once however many threads ask for it."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import pyarrow as pa

from .fetching import READERS


class HeldBlocks:
    """The blocks that were used last.

    Args:
        load: fetches a block by its number.
        most: blocks that are held.
    """

    def __init__(self, load: Callable[[int], pa.RecordBatch], most: int):
        self._load = load
        self._most = most
        self._held: OrderedDict[int, Future[pa.RecordBatch]] = OrderedDict()
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(READERS, "blocks")

    def hold(self, most: int) -> None:
        """Hold at least so many blocks from now on."""
        self._most = max(self._most, most)

    def __call__(self, numbers: Sequence[int]) -> list[pa.RecordBatch]:
        """Return some blocks; those that are not held are fetched at once.

        Raises:
            UserError: a block cannot be read.
        """
        with self._lock:
            coming = [self._asked(number) for number in numbers]
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        return [self._arrived(number, block) for number, block in zip(numbers, coming, strict=True)]

    def _asked(self, number: int) -> Future[pa.RecordBatch]:
        if number not in self._held:
            self._held[number] = self._pool.submit(self._load, number)
        self._held.move_to_end(number)
        return self._held[number]

    def _arrived(self, number: int, block: Future[pa.RecordBatch]) -> pa.RecordBatch:
        try:
            return block.result()
        except BaseException:
            with self._lock:
                self._held.pop(number, None)  # whoever asks again has another try
            raise

"""The history of a training: weights and gradient of every step, in an Arrow stream that is mapped when it is read.

A record batch of one row for each step and a last one for the final weights, all of one size, so that step t lies where
arithmetic says. A second file holds a digest of each; the digest of that file is what a log has to remember.
"""

import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raypkg.core.errors import UserError

RECORDS, DIGESTS = "history.arrow", "history.digests"
DIGEST = 16  # bytes
BEHIND = 8  # records that may wait to be written


class RecordedStep(NamedTuple):
    """One step: the learning rate, the weights before it and the gradient, float64 [p]."""

    rate: float
    w: np.ndarray
    gradient: np.ndarray


class Layout:
    """How records of p numbers lie in the file.

    Args:
        parameters: p.
        dtype: of what is stored, "float64" or "float32".
    """

    def __init__(self, parameters: int, dtype: str):
        self.parameters, self.dtype = parameters, np.dtype(dtype)
        vector = pa.list_(pa.from_numpy_dtype(self.dtype), parameters)
        self.schema = pa.schema({"rate": pa.float64(), "w": vector, "gradient": vector})
        zero = np.zeros(parameters, self.dtype)
        self.start, self.record = self.schema.serialize().size, len(self.serialized(0.0, zero, zero))

    def serialized(self, rate: float, w: np.ndarray, gradient: np.ndarray) -> pa.Buffer:
        """Return a step as an Arrow message."""
        columns = [pa.array([rate], pa.float64())]
        for field, values in zip(list(self.schema)[1:], (w, gradient), strict=True):
            flat = pa.array(np.ascontiguousarray(values, self.dtype))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
        return pa.record_batch(columns, self.schema).serialize()

    def size(self, steps: int) -> int:
        """Return the bytes of a history."""
        return self.start + (steps + 1) * (self.record + DIGEST)


def check_room(folder: Path, layout: Layout, steps: int) -> str:
    """Return the announced size of a history, in words.

    Raises:
        UserError: the disk does not have that much.
    """
    what = f"{steps:,} steps × {layout.parameters:,} parameters × 2 × {layout.dtype.itemsize} bytes"
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if layout.size(steps) > free:
        raise UserError(
            f"the history takes {readable(layout.size(steps))} ({what}), but {str(folder)!r} has {readable(free)} left:"
            " use fewer epochs, larger batches, a smaller model or history.dtype = float32"
        )
    return f"history: {readable(layout.size(steps))} ({what})"


def readable(size: float) -> str:
    """Return a number of bytes for people.

    >>> readable(7.1e12)
    '7.1 TB'
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError


class Recording:
    """A history that grows, written behind the computation; what was written can be gone on with.

    Args:
        folder: of the history; its own.
        layout: of the records.
    """

    def __init__(self, folder: Path, layout: Layout):
        self.folder, self.layout = folder, layout
        self.digests: list[bytes] = []
        self._waiting: deque[Future[Any]] = deque()
        self._pool = ThreadPoolExecutor(1, "history")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORDS).touch()
        self._file = (folder / RECORDS).open("r+b")

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; what waits is not written."""
        self._pool.shutdown(cancel_futures=True)
        with suppress(OSError):  # of bytes that wait for a full disk, which was told
            self._file.close()

    def cut(self, digests: Sequence[bytes]) -> None:
        """Keep the records of these digests, which an earlier attempt wrote, and forget what came after.

        Raises:
            UserError: they are not all there.
        """
        self._drain()
        end = self.layout.start + len(digests) * self.layout.record
        if digests and os.fstat(self._file.fileno()).st_size < end:
            raise UserError(f"{str(self.folder / RECORDS)!r} is shorter than its {len(digests)} steps")
        with self._told():
            self._file.truncate(end if digests else 0)
            self._file.seek(end if digests else 0)
            if not digests:
                self._file.write(self.layout.schema.serialize())
        self.digests = list(digests)

    def append(self, rate: float, w: np.ndarray, gradient: np.ndarray) -> None:
        """Add a step; the arrays are not changed any more.

        Raises:
            UserError: an earlier record could not be written.
        """
        while len(self._waiting) >= BEHIND:
            self._wait()
        self._waiting.append(self._pool.submit(self._write, rate, w, gradient))

    def flush(self) -> None:
        """Wait until everything is written."""
        self._drain()

    def seal(self, w: np.ndarray) -> str:
        """Add the final weights, write everything to the disk and return the history's digest."""
        self.append(0.0, w, np.zeros_like(w))
        self._drain()
        content, unfinished = b"".join(self.digests), self.folder / f"{DIGESTS}.part"
        with self._told():
            os.fsync(self._file.fileno())
            unfinished.write_bytes(content)
            unfinished.replace(self.folder / DIGESTS)
        self.close()
        return blake2b(content, digest_size=DIGEST).hexdigest()

    def _write(self, rate: float, w: np.ndarray, gradient: np.ndarray) -> None:
        message = self.layout.serialized(rate, w, gradient)
        self._file.write(message)
        self.digests.append(blake2b(message, digest_size=DIGEST).digest())

    def _drain(self) -> None:
        self._waiting.append(self._pool.submit(self._file.flush))
        while self._waiting:
            self._wait()

    def _wait(self) -> None:
        with self._told():
            self._waiting.popleft().result()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell a full disk in one line."""
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {str(self.folder / RECORDS)!r}: {error.strerror}") from None


class History(Sequence[RecordedStep]):
    """A sealed history, memory-mapped; each record is checked against its digest when it is read.

    Args:
        folder: of the history.
        layout: of the records.
        digest: of the history, from the log.

    Raises:
        UserError: missing, of another size, or the digests are not those of the log.
    """

    def __init__(self, folder: Path, layout: Layout, digest: str):
        self.path, self.layout = folder / RECORDS, layout
        try:
            self._digests = (folder / DIGESTS).read_bytes()
            self._map = pa.memory_map(str(self.path)).read_buffer()
        except OSError as error:
            raise UserError(f"the history {str(folder)!r} cannot be read: {error.strerror or error}") from None
        if blake2b(self._digests, digest_size=DIGEST).hexdigest() != digest:
            raise UserError(f"{str(folder / DIGESTS)!r} is corrupt: it is not the one that the log names")
        records = len(self._digests) // DIGEST
        if self._map.size != layout.start + records * layout.record:
            raise UserError(f"{str(self.path)!r} has {self._map.size} bytes, not those of {records} records")
        if self._map.slice(0, layout.start).to_pybytes() != layout.schema.serialize().to_pybytes():
            raise UserError(f"the head of {str(self.path)!r} is corrupt, or of another model")
        self._steps = records - 1

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> RecordedStep:  # type: ignore[override]
        """Return step 0 … T − 1.

        Raises:
            UserError: the record is corrupt.
        """
        if not 0 <= step < self._steps:
            raise IndexError(step)
        return self._read(step)

    def check(self) -> None:
        """Read every record, the final weights included.

        Raises:
            UserError: one is corrupt.
        """
        for step in range(self._steps + 1):
            self._read(step)

    @property
    def final(self) -> np.ndarray:
        """The weights after the last step, float64 [p]."""
        return self._read(self._steps).w

    def _read(self, step: int) -> RecordedStep:
        message = self._map.slice(self.layout.start + step * self.layout.record, self.layout.record)
        expected = self._digests[step * DIGEST : (step + 1) * DIGEST]
        if blake2b(message, digest_size=DIGEST).digest() != expected:
            raise UserError(f"step {step} of {str(self.path)!r} is corrupt: its digest is another")
        row = pa.ipc.read_record_batch(pa.ipc.read_message(message), self.layout.schema)
        w, gradient = (row[name].flatten().to_numpy().astype(np.float64) for name in ("w", "gradient"))
        return RecordedStep(row["rate"][0].as_py(), w, gradient)

"""The history of a training: weights and gradient of every step, in an Arrow stream that is mapped when it is read.

A record batch of one row for each step and a last one for the final weights, all of one size, so that step t lies where
arithmetic says. A second file holds a digest of each; the digest of that file is what the log has to remember.
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
import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.memory import readable
from raypkg.runs.storage import Storage

RECORDS = "history.arrow"
DIGESTS = "history.digests"
DIGEST_BYTES = 16
MOST_WAITING = 8  # records that may wait to be written


class RecordedStep(NamedTuple):
    """One step: the learning rate, the weights before it and the mean loss gradient, float64 [p]."""

    rate: float
    w: Tensor
    gradient: Tensor


class Layout:
    """How records of p numbers lie in the file.

    Args:
        parameters: p.
        dtype: of what is stored, "float64" or "float32".
    """

    def __init__(self, parameters: int, dtype: str):
        self.parameters = parameters
        self.dtype = np.dtype(dtype)
        vector = pa.list_(pa.from_numpy_dtype(self.dtype), parameters)
        self.schema = pa.schema({"rate": pa.float64(), "w": vector, "gradient": vector})
        self.header = self.schema.serialize().to_pybytes()
        zeros = torch.zeros(parameters)
        self.record_bytes = len(self.message(0.0, zeros, zeros))

    @classmethod
    def of(cls, model: nn.Module, dtype: str) -> "Layout":
        """Return the layout of a model's history."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return cls(parameters, dtype)

    def message(self, rate: float, w: Tensor, gradient: Tensor) -> pa.Buffer:
        """Return a step as an Arrow message."""
        rates = pa.array([rate], pa.float64())
        vectors = [self._column(w, "w"), self._column(gradient, "gradient")]
        return pa.record_batch([rates, *vectors], self.schema).serialize()

    def step(self, message: pa.Buffer) -> RecordedStep:
        """Return the step of an Arrow message."""
        row = pa.ipc.read_record_batch(pa.ipc.read_message(message), self.schema)
        rate = row["rate"][0].as_py()
        return RecordedStep(rate, _vector(row["w"]), _vector(row["gradient"]))

    def start(self, record: int) -> int:
        """Return where in the file a record begins."""
        return len(self.header) + record * self.record_bytes

    def size(self, steps: int) -> int:
        """Return the bytes of a history, its digests included."""
        records = steps + 1  # the last one holds the final weights
        return self.start(records) + records * DIGEST_BYTES

    def describe(self, steps: int) -> str:
        """Return the size of a history in words."""
        size = readable(self.size(steps))
        return f"{size} ({steps:,} steps × {self.parameters:,} parameters × 2 × {self.dtype.itemsize} bytes)"

    def _column(self, vector: Tensor, name: str) -> pa.Array:
        values = np.ascontiguousarray(vector.numpy(), self.dtype)
        kind = self.schema.field(name).type
        return pa.FixedSizeListArray.from_arrays(pa.array(values), type=kind)


def _vector(column: pa.Array) -> Tensor:
    values = column.flatten().to_numpy()
    return torch.from_numpy(values.astype(np.float64))  # a copy: the mapped file is read-only


def history_folder(storage: Storage, number: int) -> Path:
    """Return the folder of the history that the number-th entry of a run's log left.

    Raises:
        UserError: the run is not on a local disk, where alone a history can be mapped.
    """
    if storage.local is None:
        raise UserError(f"{storage.root}: a history is memory-mapped, so the run must be in a local folder")
    return storage.local / "versions" / f"{number:05d}"


def check_room(folder: Path, layout: Layout, steps: int) -> None:
    """Refuse a history that the disk has no room for.

    Raises:
        UserError: how much it takes, and how much there is.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if layout.size(steps) > free:
        raise UserError(
            f"the history takes {layout.describe(steps)}, but {str(folder)!r} has {readable(free)} left:"
            " use fewer epochs, larger batches, a smaller model or history.dtype = float32"
        )


class HistoryWriter:
    """Writes a history behind the computation; one that was interrupted can be continued.

    Args:
        folder: of the history; its own.
        layout: of the records.

    Attributes:
        digests: of the records that are written.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, layout: Layout):
        self.layout = layout
        self.digests: list[bytes] = []
        self._folder = folder
        self._name = repr(str(folder / RECORDS))
        self._waiting: deque[Future[Any]] = deque()
        self._thread = ThreadPoolExecutor(1, "history")
        with self._disk_error_in_one_line():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RECORDS).touch()
            self._file = (folder / RECORDS).open("r+b")

    def __enter__(self) -> "HistoryWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, digests: Sequence[bytes] = ()) -> None:
        """Begin a history, or continue one behind the records of these digests, which an earlier attempt wrote.

        Raises:
            UserError: those records are not all there.
        """
        self.flush()
        end = self.layout.start(len(digests)) if digests else 0
        if os.fstat(self._file.fileno()).st_size < end:
            raise UserError(f"{self._name} is shorter than its {len(digests)} steps")
        with self._disk_error_in_one_line():
            self._file.truncate(end)
            self._file.seek(end)
            if not digests:
                self._file.write(self.layout.header)
        self.digests = list(digests)

    def append(self, rate: float, w: Tensor, gradient: Tensor) -> None:
        """Add a step; its tensors must not change any more.

        Raises:
            UserError: an earlier record could not be written.
        """
        self._wait(MOST_WAITING - 1)
        written = self._thread.submit(self._write, rate, w, gradient)
        self._waiting.append(written)

    def flush(self) -> None:
        """Wait until everything is written."""
        self._waiting.append(self._thread.submit(self._file.flush))
        self._wait(0)

    def seal(self, w: Tensor) -> str:
        """Add the final weights, write everything to the disk and return the history's digest."""
        self.append(0.0, w, torch.zeros_like(w))
        self.flush()
        content = b"".join(self.digests)
        with self._disk_error_in_one_line():
            os.fsync(self._file.fileno())
        Storage(str(self._folder)).write(DIGESTS, content)
        self.close()
        return _digest(content).hex()

    def close(self) -> None:
        """Close the file; records that still wait are dropped."""
        self._thread.shutdown(cancel_futures=True)
        with suppress(OSError):  # of buffered bytes for which the disk is full, which was reported
            self._file.close()

    def _write(self, rate: float, w: Tensor, gradient: Tensor) -> None:
        message = self.layout.message(rate, w, gradient)
        self._file.write(message)
        self.digests.append(_digest(message))

    def _wait(self, most: int) -> None:
        """Wait until at most so many records are not yet written."""
        with self._disk_error_in_one_line():
            while len(self._waiting) > most:
                self._waiting.popleft().result()

    @contextmanager
    def _disk_error_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self._name}: {error.strerror}") from None


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
        self.layout = layout
        self._name = repr(str(folder / RECORDS))
        try:
            self._digests = (folder / DIGESTS).read_bytes()
            self._content = pa.memory_map(str(folder / RECORDS)).read_buffer()
        except OSError as error:
            file = error.filename or str(folder / RECORDS)  # Arrow's errors do not have it
            reason = error.strerror or error
            raise UserError(f"the history {file!r} cannot be read: {reason}") from None
        if _digest(self._digests).hex() != digest:
            raise UserError(f"{str(folder / DIGESTS)!r} is corrupt: it is not the one that the log names")
        records = len(self._digests) // DIGEST_BYTES
        if self._content.size != layout.start(records):
            raise UserError(f"{self._name} has {self._content.size} bytes, not those of {records} records")
        header = self._content.slice(0, len(layout.header))
        if header.to_pybytes() != layout.header:
            raise UserError(f"the head of {self._name} is corrupt, or of another model")
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

    @property
    def final(self) -> Tensor:
        """The weights after the last step, float64 [p]."""
        return self._read(self._steps).w

    def check(self) -> None:
        """Read every record, the final weights included.

        Raises:
            UserError: one is corrupt.
        """
        for record in range(self._steps + 1):
            self._read(record)

    def _read(self, record: int) -> RecordedStep:
        message = self._content.slice(self.layout.start(record), self.layout.record_bytes)
        start = record * DIGEST_BYTES
        if _digest(message) != self._digests[start : start + DIGEST_BYTES]:
            raise UserError(f"step {record} of {self._name} is corrupt: its digest is another")
        return self.layout.step(message)


def _digest(content: pa.Buffer | bytes) -> bytes:
    return blake2b(content, digest_size=DIGEST_BYTES).digest()

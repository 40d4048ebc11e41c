"""The history of a training: weights and gradient of every step, in a memory-mapped Arrow stream.

The file has one record batch for each step, each of one row, and a last one for the final weights. All have the same
size, so arithmetic finds step t. A second file holds a digest of each; the journal keeps the digest of that file.
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
    """One step of a recorded training."""

    rate: float  # learning rate
    w: Tensor  # weights before the step, float64 [p]
    gradient: Tensor  # mean loss gradient without the L2 term, float64 [p]


class Layout:
    """The layout of a history file: vectors of p parameters in "float64" or "float32"."""

    def __init__(self, parameters: int, dtype: str):
        self.parameters = parameters
        self.dtype = np.dtype(dtype)
        self._vector = pa.list_(pa.from_numpy_dtype(self.dtype), parameters)
        self.schema = pa.schema({"rate": pa.float64(), "w": self._vector, "gradient": self._vector})
        self.header = self.schema.serialize().to_pybytes()
        zeros = torch.zeros(parameters)
        self.record_bytes = len(self.message(0.0, zeros, zeros))

    @classmethod
    def of(cls, model: nn.Module, dtype: str) -> "Layout":
        """Return the layout of a model's history."""
        return cls(sum(parameter.numel() for parameter in model.parameters()), dtype)

    def message(self, rate: float, w: Tensor, gradient: Tensor) -> pa.Buffer:
        """Return a step as an Arrow message."""
        columns = [pa.array([rate], pa.float64())]
        for vector in (w, gradient):
            values = pa.array(np.ascontiguousarray(vector.numpy(), self.dtype))
            columns.append(pa.FixedSizeListArray.from_arrays(values, type=self._vector))
        return pa.record_batch(columns, self.schema).serialize()

    def step(self, message: pa.Buffer) -> RecordedStep:
        """Return the step of an Arrow message."""
        row = pa.ipc.read_record_batch(pa.ipc.read_message(message), self.schema)
        w, gradient = (
            # A copy, as the mapped file is read-only.
            torch.from_numpy(row[name].flatten().to_numpy().astype(np.float64))
            for name in ("w", "gradient")
        )
        return RecordedStep(row["rate"][0].as_py(), w, gradient)

    def start(self, record: int) -> int:
        """Return the position of a record in the file."""
        return len(self.header) + record * self.record_bytes

    def size(self, steps: int) -> int:
        """Return the bytes of a history, digests included."""
        records = steps + 1  # the last one holds the final weights
        return self.start(records) + records * DIGEST_BYTES

    def describe(self, steps: int) -> str:
        """Return the size of a history in words."""
        size = readable(self.size(steps))
        return f"{size} ({steps:,} steps × {self.parameters:,} parameters × 2 × {self.dtype.itemsize} bytes)"


def history_folder(storage: Storage, number: int) -> Path:
    """Return the folder of the history of a journal's entry; a run that is not on a local disk is refused."""
    if storage.local is None:
        raise UserError(f"{storage.root}: a history is memory-mapped, so the run must be in a local folder")
    return storage.local / "versions" / f"{number:05d}"


def check_room(folder: Path, layout: Layout, steps: int) -> None:
    """Refuse a history that does not fit on the disk."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if layout.size(steps) > free:
        raise UserError(
            f"the history takes {layout.describe(steps)}, but {str(folder)!r} has {readable(free)} left:"
            " use fewer epochs, larger batches, a smaller model or history.dtype = float32"
        )


class HistoryWriter:
    """Writes a history in a thread; an interrupted one can be continued."""

    def __init__(self, folder: Path, layout: Layout):
        self.layout = layout
        self.digests: list[bytes] = []  # of the written records
        self._folder = folder
        self._waiting: deque[Future[Any]] = deque()
        self._thread = ThreadPoolExecutor(1, "history")
        with self._one_line_errors():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RECORDS).touch()
            self._file = (folder / RECORDS).open("r+b")

    def start(self, digests: Sequence[bytes] = ()) -> None:
        """Begin a history, or continue one after the records with these digests."""
        self.flush()
        end = self.layout.start(len(digests)) if digests else 0
        if os.fstat(self._file.fileno()).st_size < end:
            raise UserError(f"{str(self._folder / RECORDS)!r} is shorter than its {len(digests)} steps")
        with self._one_line_errors():
            self._file.truncate(end)
            self._file.seek(end)
            if not digests:
                self._file.write(self.layout.header)
        self.digests = list(digests)

    def append(self, rate: float, w: Tensor, gradient: Tensor) -> None:
        """Add a step, to be written while training continues; its tensors must not change any more."""

        def write() -> None:
            message = self.layout.message(rate, w, gradient)
            self._file.write(message)
            self.digests.append(digest(message))

        self._wait(MOST_WAITING - 1)
        self._waiting.append(self._thread.submit(write))

    def flush(self) -> None:
        """Wait until everything is written."""
        self._waiting.append(self._thread.submit(self._file.flush))
        self._wait(0)

    def seal(self, w: Tensor) -> str:
        """Add the final weights, sync everything to the disk and return the history's digest."""
        self.append(0.0, w, torch.zeros_like(w))
        self.flush()
        with self._one_line_errors():
            os.fsync(self._file.fileno())
        content = b"".join(self.digests)
        Storage(str(self._folder)).write(DIGESTS, content)
        self.close()
        return digest(content).hex()

    def close(self) -> None:
        """Close the file and drop records that still wait."""
        self._thread.shutdown(cancel_futures=True)
        with suppress(OSError):  # bytes that did not fit on a full disk, which was reported
            self._file.close()

    def _wait(self, most: int) -> None:
        """Wait until at most ``most`` records are unwritten."""
        with self._one_line_errors():
            while len(self._waiting) > most:
                self._waiting.popleft().result()

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {str(self._folder / RECORDS)!r}: {error.strerror}") from None


class History(Sequence[RecordedStep]):
    """A sealed history, memory-mapped.

    Opening it checks ``sealed``, its digest in the journal; reading a step checks the step's digest.
    """

    def __init__(self, folder: Path, layout: Layout, sealed: str):
        self.layout = layout
        self._name = repr(str(folder / RECORDS))
        try:
            self._digests = (folder / DIGESTS).read_bytes()
            self._content = pa.memory_map(str(folder / RECORDS)).read_buffer()
        except OSError as error:
            file = error.filename or str(folder / RECORDS)  # Arrow's errors do not have it
            raise UserError(f"the history {file!r} cannot be read: {error.strerror or error}") from None
        if digest(self._digests).hex() != sealed:
            raise UserError(f"{str(folder / DIGESTS)!r} is corrupt: its digest is not that of the journal")
        records = len(self._digests) // DIGEST_BYTES
        head = self._content.slice(0, len(layout.header)).to_pybytes()
        if self._content.size != layout.start(records) or head != layout.header:
            raise UserError(f"{self._name} is corrupt, or of another model: it has not the size and head of its steps")
        self._steps = records - 1

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> RecordedStep:  # type: ignore[override]
        if not 0 <= step < self._steps:
            raise IndexError(step)
        return self.read(step)

    def check(self) -> None:
        """Read every record, the final weights included, to find a corrupt one."""
        for record in range(self._steps + 1):
            self.read(record)

    def read(self, record: int) -> RecordedStep:
        """Return a step; the one after the last has the final weights."""
        message = self._content.slice(self.layout.start(record), self.layout.record_bytes)
        start = record * DIGEST_BYTES
        if digest(message) != self._digests[start : start + DIGEST_BYTES]:
            raise UserError(f"step {record} of {self._name} is corrupt: its digest is another")
        return self.layout.step(message)


def digest(content: pa.Buffer | bytes) -> bytes:
    """Return 16 bytes of BLAKE2b, as ``Storage.digest`` does of a file."""
    return blake2b(content, digest_size=DIGEST_BYTES).digest()

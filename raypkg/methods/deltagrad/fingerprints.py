"""What a recorded training was made of: a digest of its settings and of every row, and its standardisation."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.data import Data
from raypkg.data.split import Split
from raypkg.experiments.samples import Samples
from raypkg.runs.storage import Storage

from .ledger import digest, stored_digest
from .settings import REPLAYED, DeltaGradSettings

ROWS = "rows.parquet"
FACTS = ("mean", "std", "shape", "classes")  # kept beside the digests
BLOCK = 1 << 14  # rows read at once
ALIKE = {*REPLAYED, "from_", "micro_batch"}  # of training: they have one value, or no part in what was recorded
# Settings that may change after training.
FREE: dict[str, Any] = {"cluster": True, "track": True, "replay": True, "train": ALIKE}


def settings_digest(settings: DeltaGradSettings) -> str:
    """Return the digest of all settings that the recorded steps follow from."""
    values = settings.model_dump(mode="json", exclude=FREE)
    return digest(json.dumps(values, sort_keys=True).encode())


def write_fingerprints(storage: Storage, split: Split) -> str:
    """Write the digests of a training split's rows, and its standardisation; return the digest of the file."""
    facts = {name: getattr(split, name) for name in FACTS}
    metadata = {"effray": json.dumps(facts)}
    table = pa.table({"digest": row_digests(split)})
    storage.write_table(ROWS, table.replace_schema_metadata(metadata))
    return stored_digest(storage, ROWS)


def read_fingerprints(storage: Storage, expected: str) -> pa.Table:
    """Return the digests of the rows, with the standardisation as metadata.

    Raises:
        UserError: the file is missing, or its digest is not the expected one of the log.
    """
    table = None
    if stored_digest(storage, ROWS) == expected:
        table = storage.read_table(ROWS)
    if table is None:
        raise UserError(f"{storage.root}/{ROWS} is missing or corrupt: it is not what the log names")
    return table


def standardised_as_trained(fingerprints: pa.Table, samples: Samples) -> Samples:
    """Return the samples standardised as they were for the recorded training, whatever has become of deleted rows.

    Raises:
        UserError: the data set has another length, shape or other classes.
    """
    split = samples.data.train
    facts = json.loads(fingerprints.schema.metadata[b"effray"])
    _check_same("samples", len(fingerprints), len(split))
    _check_same("shape", facts["shape"], list(split.shape))
    _check_same("classes", facts["classes"], list(split.classes))
    mean = tuple(facts["mean"])
    std = tuple(facts["std"])
    standardised = Data(*(replace(part, mean=mean, std=std) for part in samples.data))
    return samples._replace(data=standardised)


def check_rows(fingerprints: pa.Table, split: Split, active: Tensor) -> None:
    """Refuse a data set in which a row that is in use has changed; deleted ones may have been blanked.

    Raises:
        UserError: the first such row.
    """
    changed = row_digests(split) != fingerprints["digest"].to_numpy()
    in_use = active[: len(split)].numpy()  # samples that were added later have no row in the data set
    changed_in_use = changed & in_use
    if changed_in_use.any():
        first = int(changed_in_use.argmax())
        raise UserError(f"sample {first} of the data set is not what it was in the recorded training")


def row_digests(split: Split) -> np.ndarray:
    """Return a number for each sample, uint64 [n]: Σ_j r_j·x_j mod 2⁶⁴ with random odd r, x as words.

    Its label and its id, if it has one, are among the words. It tells changes that happen, not such as are made to
    deceive.
    """
    digests = []
    for words in _words(split):
        width = words.shape[1]
        rng = np.random.default_rng(0)  # the same factors for every block
        factors = rng.integers(2**63, size=width, dtype=np.uint64) * 2 + 1
        digests.append(words @ factors)
    return np.concatenate(digests)


def _words(split: Split) -> Iterator[np.ndarray]:
    """Yield rows, labels and ids, if there are any, as 64-bit words, uint64 [b, ⌈bytes/8⌉ + 1 or 2], block by block."""
    y = split.y.numpy()
    for start in range(0, len(split), BLOCK):
        end = min(start + BLOCK, len(split))
        rows = np.arange(start, end)
        x = np.ascontiguousarray(split.take(rows))
        content = x.reshape(len(rows), -1).view(np.uint8)  # [b, bytes]
        missing = -content.shape[1] % 8  # bytes to a whole word
        padding = np.zeros((len(rows), missing), np.uint8)
        words = np.concatenate([content, padding], axis=1).view(np.uint64)
        named = [words, y[rows, None].astype(np.uint64)]
        if split.ids is not None:
            named.append(split.ids.numpy()[rows, None].astype(np.uint64))
        yield np.concatenate(named, axis=1)


def _check_same(what: str, was: object, now: object) -> None:
    if was != now:
        raise UserError(f"the data set is not that of the recorded training: its {what} were {was} and are {now}")

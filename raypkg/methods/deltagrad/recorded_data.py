"""What a recorded training was made of: its settings, its standardisation, and a digest of every row."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.data.split import Split
from raypkg.phases.samples import Samples
from raypkg.runs.storage import Storage

from .ledger import digest

ROWS = "rows.parquet"
BLOCK = 1 << 14  # rows read at once
FREE = {"cluster", "track", "replay"}  # settings that may change after training


def settings_digest(settings: Any) -> str:
    """Return the digest of all settings that the recorded steps follow from."""
    return digest(json.dumps(settings.model_dump(mode="json", exclude=FREE), sort_keys=True).encode())


def record_data(storage: Storage, found: Samples) -> str:
    """Write the rows' digests and the standardisation into the run folder; return the file's digest."""
    split = found.data.train
    facts = {"mean": split.mean, "std": split.std, "shape": split.shape, "classes": split.classes}
    table = pa.table({"digest": row_digests(split)})
    storage.write_table(ROWS, table.replace_schema_metadata({"effray": json.dumps(facts)}))
    return digest(storage.read(ROWS) or b"")


def as_trained(storage: Storage, found: Samples) -> Samples:
    """Return the data set standardised as it was for the recorded training, whatever has become of deleted rows.

    Raises:
        UserError: it has another length, shape or other classes.
    """
    table, split = storage.read_table(ROWS), found.data.train
    if table is None:
        raise UserError(f"{storage.root}/{ROWS} is missing: it tells what the recorded training was made of")
    facts = json.loads(table.schema.metadata[b"effray"])
    for what, was, is_ in (
        ("samples", len(table), len(split)),
        ("shape", facts["shape"], list(split.shape)),
        ("classes", facts["classes"], list(split.classes)),
    ):
        if was != is_:
            raise UserError(f"the data set is not that of the recorded training: its {what} were {was} and are {is_}")
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    train, test = (replace(part, mean=mean, std=std) for part in found.data)
    return found._replace(data=found.data._replace(train=train, test=test))


def check_rows(storage: Storage, split: Split, active: Tensor, expected: str) -> None:
    """Refuse a data set in which a row that is in use has changed; deleted ones may have been blanked.

    Raises:
        UserError: the first such row, or the digests themselves are not those of the log.
    """
    table = storage.read_table(ROWS)
    if table is None or digest(storage.read(ROWS) or b"") != expected:
        raise UserError(f"{storage.root}/{ROWS} is missing or corrupt: it is not what the log names")
    changed = (row_digests(split) != table["digest"].to_numpy()) & active[: len(split)].numpy()
    if changed.any():
        raise UserError(f"sample {int(changed.argmax())} of the data set is not what it was in the recorded training")


def row_digests(split: Split) -> np.ndarray:
    """Return a number for each sample and its label, uint64 [n]: Σ_j r_j·x_j mod 2⁶⁴ with random odd r, x as words.

    It tells changes that happen, not such as are made to deceive.
    """
    digests = []
    for rows in np.split(np.arange(len(split)), range(BLOCK, len(split), BLOCK)):
        content = np.ascontiguousarray(split.take(rows)).reshape(len(rows), -1).view(np.uint8)
        padded = np.pad(content, ((0, 0), (0, -content.shape[1] % 8))).view(np.uint64)
        words = np.concatenate([padded, split.y.numpy()[rows, None].astype(np.uint64)], axis=1)
        factors = np.random.default_rng(0).integers(2**63, size=words.shape[1], dtype=np.uint64) * 2 + 1
        digests.append(words @ factors)
    return np.concatenate(digests)

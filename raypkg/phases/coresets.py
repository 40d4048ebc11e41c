"""Coresets and scores as parquet, with where they come from in the file's metadata."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.data.split import Split
from raypkg.methods.coreset import Coreset
from raypkg.methods.record import Record
from raypkg.runs.storage import Storage

FILE = "coreset.parquet"
SCORES = "scores.parquet"


def save_coreset(
    storage: Storage, coreset: Coreset, split: Split, provenance: Mapping[str, Any], scores: Tensor | None = None
) -> None:
    """Write index, weight, class and (where there is one) score of every picked sample.

    Args:
        storage: the run folder.
        coreset: positions in ``split``.
        split: gives labels and class names.
        provenance: how it was made, kept as JSON in the file's metadata.
        scores: of all samples of the split, float32 [n].
    """
    labels = split.y[coreset.indices]
    columns = {
        "index": coreset.indices.numpy(),
        "weight": coreset.weights.numpy(),
        "class": [split.classes[label] for label in labels.tolist()],
    }
    if scores is not None:
        columns["score"] = scores[coreset.indices].numpy()
    facts = {"samples": len(split), **provenance}
    storage.write_table(FILE, pa.table(columns).replace_schema_metadata({"effray": json.dumps(facts)}))


def load_coreset(path: str, split: Split, held_out: Tensor) -> Coreset:
    """Read a coreset that ``save_coreset`` wrote.

    Args:
        path: of the file.
        split: what its indices are positions in.
        held_out: positions that must not be trained on.

    Raises:
        UserError: no such file, not a coreset, made for a data set of another size, or with held-out samples.
    """
    table = read_coreset(path)
    facts = json.loads((table.schema.metadata or {}).get(b"effray", b"{}"))
    if facts.get("samples", len(split)) != len(split):
        raise UserError(f"{path} was made for {facts['samples']} samples, this data set has {len(split)}")
    indices = torch.tensor(table["index"].to_numpy(), dtype=torch.int64)
    if len(indices) and int(indices.max()) >= len(split):
        raise UserError(f"{path} has index {int(indices.max())}, this data set ends at {len(split) - 1}")
    leaked = int(torch.isin(indices, held_out).sum())
    if leaked:
        raise UserError(
            f"{leaked} of the {len(indices)} samples in {path} are held out here: give its --seed and"
            " --dataset.validation"
        )
    return Coreset(indices, torch.tensor(table["weight"].to_numpy(), dtype=torch.float32))


def read_coreset(path: str) -> pa.Table:
    """Return a coreset file's table: index, weight, class and perhaps score.

    Raises:
        UserError: no such file, or not a coreset.
    """
    folder, _, name = path.rpartition("/")
    table = Storage(folder or ".").read_table(name)
    if table is None:
        raise UserError(f"there is no coreset file {path}")
    if not {"index", "weight"} <= set(table.column_names):
        raise UserError(f"{path} is no coreset: it needs columns index and weight, has {', '.join(table.column_names)}")
    return table


def save_record(storage: Storage, model: str, record: Record) -> None:
    """Write what training saw of each sample beside the model of that file name."""
    table = pa.table({"loss": record.losses.numpy(), "forgotten": record.forgotten.numpy()})
    storage.write_table(_record_of(model), table)


def load_record(storage: Storage, model: str, y: Tensor) -> Record:
    """Return the record beside a model, or an empty one where there is none.

    Args:
        storage: the run folder.
        model: file name of the model.
        y: labels of the training split, int64 [n].

    Raises:
        UserError: made for a data set of another size.
    """
    table = storage.read_table(_record_of(model))
    if table is None:
        return Record.empty(y)
    if len(table) != len(y):
        raise UserError(f"{storage.root} was trained on {len(table)} samples, this data set has {len(y)}")
    return Record(y, *(torch.tensor(table[name].to_numpy()) for name in ("loss", "forgotten")))


def _record_of(model: str) -> str:
    return f"{model.removesuffix('.safetensors')}_record.parquet"


def save_scores(storage: Storage, indices: Tensor, scores: Tensor) -> None:
    """Write the gradient norm of every sample that could have been picked."""
    storage.write_table(SCORES, pa.table({"index": indices.numpy(), "score": scores.numpy()}))

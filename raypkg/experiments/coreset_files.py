"""Coresets and scores as parquet files; a coreset's metadata says what it was made from."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from raypkg.core.address import folder_and_name
from raypkg.core.errors import UserError
from raypkg.core.settings import RunSettings
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.run import check_weights
from raypkg.runs.agreement import column_of, is_number
from raypkg.runs.storage import Storage

from .samples import Samples

FILE = "coreset.parquet"
GIVEN = "given_coreset.parquet"  # the first coreset of a training that then selects others
SCORES = "scores.parquet"
KEY = b"effray"  # of the metadata


def origin(experiment: RunSettings) -> dict[str, Any]:
    """Return the settings on which the positions in a coreset depend."""
    return {
        "dataset": last_part(experiment.dataset.name),
        "seed": experiment.seed,
        "validation": experiment.dataset.validation,
    }


def last_part(name: str) -> str:
    """Return a data set's name without its folder: data may be moved.

    >>> last_part("parquet:/data/cifar10"), last_part("table:s3://bucket/rows.csv?region=x"), last_part("digits")
    ('cifar10', 'rows.csv', 'digits')
    """
    return folder_and_name(name)[1]


def save_coreset(
    storage: Storage,
    coreset: Coreset,
    split: Split,
    provenance: Mapping[str, Any],
    scores: Tensor | None = None,
    file: str = FILE,
) -> None:
    """Write index, weight, class and, if known, id and score of every picked sample."""
    labels = split.y[coreset.indices].tolist()
    columns = {
        "index": coreset.indices.numpy(),
        "weight": coreset.weights.numpy(),
        "class": [split.classes[label] for label in labels],
    }
    if split.ids is not None:
        columns["id"] = split.ids[coreset.indices].numpy()
    if scores is not None:
        columns["score"] = scores[coreset.indices].numpy()
    facts = json.dumps({"samples": len(split), **provenance})
    storage.write_table(file, pa.table(columns).replace_schema_metadata({KEY: facts}))


def keep_selected(
    storage: Storage,
    split: Split,
    coreset: Coreset,
    provenance: Mapping[str, Any],
    indices: Tensor,
    scores: Tensor | None,
) -> None:
    """Write the run's coreset and, if known, the gradient norms of all samples that it was selected from."""
    by_position = None
    if scores is not None:
        columns = {"index": indices.numpy(), "score": scores.numpy()}
        if split.ids is not None:
            columns["id"] = split.ids[indices].numpy()
        storage.write_table(SCORES, pa.table(columns))
        by_position = torch.zeros(len(split)).index_put((indices,), scores)
    save_coreset(storage, coreset, split, provenance, by_position)


def given_coreset(settings: RunSettings, path: str, samples: Samples, storage: Storage, file: str) -> Coreset:
    """Copy a coreset into the run folder under a name, unless an earlier attempt did, and return it."""
    split = samples.data.train
    name = settings.dataset.name
    if file in storage.list():
        return load_coreset(f"{storage.root}/{file}", split, samples.held_out, name)
    coreset = load_coreset(path, split, samples.held_out, name)
    save_coreset(storage, coreset, split, {**origin(settings), "source": path}, file=file)
    return coreset


def load_coreset(path: str, split: Split, held_out: Tensor, dataset: str) -> Coreset:
    """Read the user's coreset, or one that ``save_coreset`` wrote.

    It is refused if it is of another data set, has a held-out sample, or no weight above 0.
    """
    table = read_coreset(path)
    try:
        facts = json.loads((table.schema.metadata or {}).get(KEY, b"{}"))
    except ValueError:  # written by other software
        facts = {}
    facts = facts if isinstance(facts, dict) else {}
    if (made_for := facts.get("samples", len(split))) != len(split):
        raise UserError(f"{path} was made for {made_for} samples, this data set has {len(split)}")
    source = str(facts.get("dataset", dataset))
    if last_part(source) != last_part(dataset):
        raise UserError(f"{path} was made for {source}, this data set is {dataset}")
    if not len(table):
        raise UserError(f"{path} holds no sample")

    positions = column_of(table, "index", path, pa.types.is_integer)
    if (last := int(positions.max())) >= len(split):  # before int64, which an index may exceed
        raise UserError(f"{path} has index {last}, this data set ends at {len(split) - 1}")
    indices = torch.tensor(positions, dtype=torch.int64)
    if leaked := int(torch.isin(indices, held_out).sum()):
        problem = f"{leaked} of the {len(indices)} samples in {path} are held out here"
        raise UserError(f"{problem}: give its --seed and --dataset.validation")
    weights = column_of(table, "weight", path, is_number)
    coreset = Coreset(indices, torch.tensor(weights, dtype=torch.float32))
    check_weights(coreset, path)
    return coreset


def read_coreset(path: str) -> pa.Table:
    """Return a coreset file's table: index, weight, class and perhaps score."""
    folder, name = Storage.around(path)
    if not name or "\0" in name or folder.list(name):
        raise UserError(f"{path!r} is no coreset file")
    table = folder.read_table(name)
    if table is None:
        raise UserError(f"there is no coreset file {path}")
    names = table.column_names
    if not {"index", "weight"} <= set(names):
        raise UserError(f"{path} is no coreset: it needs columns index and weight, has {', '.join(names)}")
    return table

"""Coresets and scores as parquet, with where they come from in the file's metadata."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raypkg.core.address import folder_and_name
from raypkg.core.errors import UserError
from raypkg.core.settings import RunSettings
from raypkg.coresets.record import Record
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.run import check_weights
from raypkg.runs.agreement import column_of, is_number
from raypkg.runs.storage import Storage

from .samples import Samples

FILE = "coreset.parquet"
GIVEN = "given_coreset.parquet"  # to begin with, where training then selects others
SCORES = "scores.parquet"


def origin(experiment: RunSettings) -> dict[str, Any]:
    """Return what the positions in a coreset depend on."""
    return {
        "dataset": last_part(experiment.dataset.name),
        "seed": experiment.seed,
        "validation": experiment.dataset.validation,
    }


def last_part(name: str) -> str:
    """Return a data set's name without the folder that it is in: data may be moved.

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
    """Write index, weight, class and (where there are such) id and score of every picked sample.

    Args:
        storage: the run folder.
        coreset: positions in ``split``.
        split: gives labels and class names.
        provenance: how it was made, kept as JSON in the file's metadata.
        scores: gradient norms of all samples of the split, float32 [n].
        file: its name.
    """
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
    table = pa.table(columns).replace_schema_metadata({"effray": facts})
    storage.write_table(file, table)


def load_coreset(path: str, split: Split, held_out: Tensor, dataset: str) -> Coreset:
    """Read a coreset that ``save_coreset`` wrote.

    Args:
        path: of the file.
        split: what its indices are positions in.
        held_out: positions that must not be trained on.
        dataset: its name.

    Raises:
        UserError: no such file, not a coreset, empty, without a weight above 0, made for another data set, or with
            held-out samples.
    """
    table = read_coreset(path)
    _check_made_for(_facts(table), path, split, dataset)
    if not len(table):
        raise UserError(f"{path} holds no sample")
    positions = column_of(table, "index", path, pa.types.is_integer)
    _check_end(positions, path, split)
    indices = torch.tensor(positions, dtype=torch.int64)
    _check_positions(indices, path, held_out)
    weights = column_of(table, "weight", path, is_number)
    coreset = Coreset(indices, torch.tensor(weights, dtype=torch.float32))
    check_weights(coreset, path)
    return coreset


def _check_end(positions: np.ndarray, path: str, split: Split) -> None:
    """Refuse positions beyond the data set, of whatever integer type they are."""
    last = int(positions.max())
    if last >= len(split):
        raise UserError(f"{path} has index {last}, this data set ends at {len(split) - 1}")


def _check_positions(indices: Tensor, path: str, held_out: Tensor) -> None:
    leaked = int(torch.isin(indices, held_out).sum())
    if leaked:
        raise UserError(
            f"{leaked} of the {len(indices)} samples in {path} are held out here: give its --seed and"
            " --dataset.validation"
        )


def read_coreset(path: str) -> pa.Table:
    """Return a coreset file's table: index, weight, class and perhaps score.

    Raises:
        UserError: no such file, or not a coreset.
    """
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


def given_coreset(settings: RunSettings, path: str, samples: Samples, storage: Storage, file: str) -> Coreset:
    """Copy a coreset into the run folder under a name, unless an earlier attempt did, and return it."""
    split = samples.data.train
    name = settings.dataset.name
    if file in storage.list():
        return load_coreset(f"{storage.root}/{file}", split, samples.held_out, name)
    coreset = load_coreset(path, split, samples.held_out, name)
    save_coreset(storage, coreset, split, {**origin(settings), "source": path}, file=file)
    return coreset


def save_record(storage: Storage, model: str, record: Record) -> None:
    """Write what training saw of each sample beside the model of that file name."""
    never = torch.full_like(record.losses, torch.inf)  # where hits, or margins, were not recorded
    forgotten = never if record.forgotten is None else record.forgotten
    margins = never if record.margins is None else record.margins
    columns = {"loss": record.losses, "forgotten": forgotten, "margin": margins}
    table = pa.table({name: values.numpy() for name, values in columns.items()})
    storage.write_table(record_of(model), table)


def load_record(storage: Storage, model: str, y: Tensor) -> Record:
    """Return the record beside a model, or an empty one where there is none.

    Args:
        storage: the run folder.
        model: file name of the model.
        y: labels of the training split, int64 [n].

    Raises:
        UserError: made for a data set of another size.
    """
    table = storage.read_table(record_of(model))
    if table is None:
        return Record.empty(y)
    path = f"{storage.root}/{record_of(model)}"
    if len(table) != len(y):
        raise UserError(f"{path} is of a training on {len(table)} samples, this data set has {len(y)}")
    losses = torch.tensor(column_of(table, "loss", path, pa.types.is_floating))
    forgotten = torch.tensor(column_of(table, "forgotten", path, pa.types.is_floating))
    margins = None
    if "margin" in table.column_names:  # runs of earlier versions have none
        margins = torch.tensor(column_of(table, "margin", path, pa.types.is_floating))
    return Record(y, losses, forgotten, margins)


def keep_selected(
    storage: Storage,
    split: Split,
    coreset: Coreset,
    provenance: Mapping[str, Any],
    indices: Tensor,
    scores: Tensor | None,
    file: str,
) -> None:
    """Write a coreset with, where there are any, the gradient norms of all samples that could have been picked.

    Args:
        storage: the run folder.
        split: what positions are in.
        coreset: positions in ``split``.
        provenance: how it was made.
        indices: the samples that took part, int64 [n].
        scores: theirs, float32 [n]; None where there are none.
        file: of the coreset.
    """
    by_position = None
    if scores is not None:
        columns = {"index": indices.numpy(), "score": scores.numpy()}
        if split.ids is not None:
            columns["id"] = split.ids[indices].numpy()
        storage.write_table(scores_of(file), pa.table(columns))
        by_position = torch.zeros(len(split)).index_put((indices,), scores)
    save_coreset(storage, coreset, split, provenance, by_position, file)


def scores_of(file: str) -> str:
    """Return the name of the file with the scores that a coreset was picked by.

    >>> scores_of("coreset.parquet"), scores_of("second.parquet")
    ('scores.parquet', 'second_scores.parquet')
    """
    return SCORES if file == FILE else f"{file.removesuffix('.parquet')}_{SCORES}"


def record_of(model: str) -> str:
    """Return the file name of a model's record.

    >>> record_of("model.safetensors")
    'model_record.parquet'
    """
    return f"{model.removesuffix('.safetensors')}_record.parquet"


def _facts(table: pa.Table) -> dict[str, Any]:
    metadata = table.schema.metadata or {}
    try:
        facts = json.loads(metadata.get(b"effray", b"{}"))
    except ValueError:  # written by someone else
        return {}
    return facts if isinstance(facts, dict) else {}


def _check_made_for(facts: Mapping[str, Any], path: str, split: Split, dataset: str) -> None:
    """Refuse the coreset of another data set; one by someone else does not say what it was made for."""
    samples = facts.get("samples", len(split))
    if samples != len(split):
        raise UserError(f"{path} was made for {samples} samples, this data set has {len(split)}")
    origin = str(facts.get("dataset", dataset))
    if last_part(origin) != last_part(dataset):
        raise UserError(f"{path} was made for {origin}, this data set is {dataset}")

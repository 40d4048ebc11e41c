"""Coresets and scores as parquet files; a coreset's metadata says what it was made from."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from raypkg.core.address import folder_and_name
from raypkg.core.config import first_problem
from raypkg.core.errors import UserError
from raypkg.core.settings import Dataset, RunSettings
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


class Made(BaseModel):
    """Metadata of a coreset file: the data that its positions are of; further keys say how it was selected."""

    samples: int | None = None
    dataset: str | None = None
    dataset_options: dict[str, Any] | None = None
    digest: str | None = None  # of the samples as these options give them


def save_coreset(
    storage: Storage,
    coreset: Coreset,
    samples: Samples,
    settings: RunSettings,
    facts: Mapping[str, Any],
    indices: Tensor | None = None,
    scores: Tensor | None = None,
    file: str = FILE,
) -> None:
    """Write index, weight, class and, if known, id and score of every picked sample; and all scores of ``indices``."""
    split = samples.data.train

    def columns(positions: Tensor) -> dict[str, Any]:
        return {"index": positions.numpy()} | ({} if split.ids is None else {"id": split.ids[positions].numpy()})

    picked = {**columns(coreset.indices), "weight": coreset.weights.numpy(), "class": _classes(split, coreset.indices)}
    if scores is not None and indices is not None:
        storage.write_table(SCORES, pa.table({**columns(indices), "score": scores.numpy()}))
        by_position = torch.zeros(len(split)).index_put((indices,), scores)
        picked["score"] = by_position[coreset.indices].numpy()
    data = {"samples": len(split), "dataset_options": settings.dataset.options, "digest": samples.digest(Dataset())}
    metadata = json.dumps({**data, **origin(settings), **facts})
    storage.write_table(file, pa.table(picked).replace_schema_metadata({KEY: metadata}))


def given_coreset(settings: RunSettings, path: str, samples: Samples, storage: Storage, file: str) -> Coreset:
    """Copy a coreset into the run folder under a name, unless an earlier attempt did, and return it."""
    if file in storage.list():
        return load_coreset(f"{storage.root}/{file}", samples, settings.dataset)
    coreset = load_coreset(path, samples, settings.dataset)
    save_coreset(storage, coreset, samples, settings, {"source": path}, file=file)
    return coreset


def load_coreset(path: str, samples: Samples, dataset: Dataset) -> Coreset:
    """Read the user's coreset, or one that ``save_coreset`` wrote.

    It is refused if it is of another data set, has a held-out sample, or no weight above 0. Read with other options,
    such as another tokenizer, a data set has the same samples if the picks have the same classes.
    """
    split = samples.data.train
    table = read_coreset(path)
    try:
        made = Made.model_validate_json((table.schema.metadata or {}).get(KEY, b"{}"))
    except ValidationError as error:
        raise UserError(f"the metadata of {path} is damaged: {first_problem(error)}") from None
    if made.samples not in (None, len(split)):
        raise UserError(f"{path} was made for {made.samples} samples, this data set has {len(split)}")
    if made.dataset is not None and last_part(made.dataset) != last_part(dataset.name):
        raise UserError(f"{path} was made for {made.dataset}, this data set is {dataset.name}")
    if made.digest and made.dataset_options == dataset.options and made.digest != samples.digest(Dataset()):
        raise UserError(f"{path} was made for other samples of {dataset.name}: its files or its drawn labels changed")
    if not len(table):
        raise UserError(f"{path} holds no sample")

    positions = column_of(table, "index", path, pa.types.is_integer)
    if (last := int(positions.max())) >= len(split):  # before int64, which an index may exceed
        raise UserError(f"{path} has index {last}, this data set ends at {len(split) - 1}")
    indices = torch.tensor(positions, dtype=torch.int64)
    if leaked := int(torch.isin(indices, samples.held_out).sum()):
        problem = f"{leaked} of the {len(indices)} samples in {path} are held out here"
        raise UserError(f"{problem}: give its --seed and --dataset.validation")
    weights = column_of(table, "weight", path, is_number)
    coreset = Coreset(indices, torch.tensor(weights, dtype=torch.float32))
    check_weights(coreset, path)
    if made.samples is not None and "class" in table.column_names:
        for index, there, here in zip(positions, table["class"].to_pylist(), _classes(split, indices), strict=True):
            if there != here:
                raise UserError(f"{path} has sample {index} in class {there!r}, this data set in {here!r}")
    return coreset


def _classes(split: Split, positions: Tensor) -> list[str]:
    return [split.classes[label] for label in split.y[positions].tolist()]


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

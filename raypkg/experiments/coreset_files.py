"""Coresets and scores as parquet files, and the agreement of two runs in them."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
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
from raypkg.runs.folder import CORESET, SCORES, RunFolder
from raypkg.runs.storage import Storage

from .samples import Samples

GIVEN = "given_coreset.parquet"  # the first coreset of a training that then selects others
KEY = b"effray"  # of the metadata


def origin(experiment: RunSettings) -> dict[str, Any]:
    """Return the settings on which the positions in a coreset depend."""
    return {
        "dataset": folder_and_name(experiment.dataset.name)[1],  # without its folder: data may be moved
        "seed": experiment.seed,
        "validation": experiment.dataset.validation,
    }


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
    file: str = CORESET,
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
    is_there = file in storage.list()
    coreset = load_coreset(f"{storage.root}/{file}" if is_there else path, samples, settings.dataset)
    if not is_there:
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
    if made.dataset is not None and folder_and_name(made.dataset)[1] != folder_and_name(dataset.name)[1]:
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
        advice = "give its --seed and --dataset.validation"
        raise UserError(f"{leaked} of the {len(indices)} samples in {path} are held out here: {advice}")
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
    table = folder.read_table(name)
    if table is None:
        raise UserError(f"there is no coreset file {path}")
    names = table.column_names
    if not {"index", "weight"} <= set(names):
        raise UserError(f"{path} is no coreset: it needs columns index and weight, has {', '.join(names)}")
    return table


def column_of(table: pa.Table, name: str, path: str, fits: Callable[[pa.DataType], bool]) -> np.ndarray:
    """Return a column, without nulls and of a fitting type, of a table that a user may have chosen or replaced."""
    values = table[name]
    nulls = values.null_count
    if not fits(values.type) or nulls:
        kind = f"{values.type} with {nulls} nulls" if nulls else values.type
        raise UserError(f"{path}: column {name} is {kind}, which it cannot be")
    return values.to_numpy()


def is_number(kind: pa.DataType) -> bool:
    """Return True for types of integers and floats."""
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


# Agreement of two runs


def compare(run: RunFolder, other: RunFolder) -> str:
    """Return the overlap of two finished runs' coresets and, if both have scores, their rank correlation, in a line."""
    sizes = []  # of the samples that each selected from
    for each in (run, other):
        if each.summary is None:
            raise UserError(f"{each.name} is not finished: there is no {CORESET} to compare")
        sizes.append(each.summary["samples"])
    correlation = rank_correlation(run, other)
    if correlation is None and sizes[0] != sizes[1]:
        raise UserError(f"{run.name} chose from {sizes[0]} samples and {other.name} from {sizes[1]}: same data set?")
    picked, others_picked = picks_of(run), picks_of(other)
    common = len(np.intersect1d(picked, others_picked))
    chance = len(others_picked) / sizes[0]  # expected share of common picks at random
    rho = "" if correlation is None else f"rank correlation of the scores {correlation:.3f}; "
    return (
        f"{run.name} against {other.name}: {rho}{common:,} of {len(picked):,} picks in common"
        f" ({common / len(picked):.1%}; by chance {chance:.1%})"
    )


def rank_correlation(run: RunFolder, other: RunFolder) -> float | None:
    """Return Spearman's rank correlation of two runs' scores of the same samples, or None if one computed none."""
    indices, others_indices = (_column(each, SCORES, "index", pa.types.is_integer) for each in (run, other))
    if indices is None or others_indices is None:
        return None
    if not np.array_equal(indices, others_indices):
        raise UserError(f"{run.name} and {other.name} scored different samples: same data set, seed and validation?")
    from scipy.stats import spearmanr

    scores, others = (_column(each, SCORES, "score", is_number) for each in (run, other))
    return float(spearmanr(scores, others).statistic)


def picks_of(run: RunFolder) -> np.ndarray:
    """Return the positions in a run's coreset, int [k]; refuse a run without one."""
    picked = _column(run, CORESET, "index", pa.types.is_integer)
    if picked is None:
        raise UserError(f"{run.name} saved no coreset: there is no {CORESET} to compare")
    return picked


def _column(run: RunFolder, file: str, name: str, fits: Callable[[pa.DataType], bool]) -> np.ndarray | None:
    run.check(file)  # a lost file is an error
    table = run.storage.read_table(file)
    return None if table is None else column_of(table, name, f"{run.storage.root}/{file}", fits)


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Return the probability that a positive sample scores higher than a negative one; ties count half.

    >>> area_under_curve(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True]))
    0.875
    """
    if positive.all() or not positive.any():
        return None
    from scipy.stats import mannwhitneyu

    negative_scores = scores[~positive]
    pairs_won = mannwhitneyu(scores[positive], negative_scores, method="asymptotic").statistic
    return float(pairs_won / (positive.sum() * len(negative_scores)))

"""Agreement of two runs in scores and picks, and of scores with what they are to find."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from raypkg.core.errors import UserError

from .folder import RunFolder

CORESET = "coreset.parquet"
SCORES = "scores.parquet"


def compare(run: RunFolder, other: RunFolder) -> str:
    """Return the overlap of two coresets and the rank correlation of the scores, if both runs have them, in one line.

    Refuse unfinished runs, and runs that selected from different samples.
    """
    for each in (run, other):
        if each.summary is None:
            raise UserError(f"{each.name} is not finished: there is no {CORESET} to compare")
    n, others_n = ((each.summary or {})["samples"] for each in (run, other))
    correlation = rank_correlation(run, other)
    if correlation is None and n != others_n:
        raise UserError(f"{run.name} chose from {n} samples and {other.name} from {others_n}: same data set?")
    picked = picks_of(run)
    others_picked = picks_of(other)
    common = len(np.intersect1d(picked, others_picked))
    chance = len(others_picked) / n  # expected share of common picks at random
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
    if not len(picked):
        raise UserError(f"{run.storage.root}/{CORESET} holds no sample")
    return picked


def column_of(table: pa.Table, name: str, path: str, fits: Callable[[pa.DataType], bool]) -> np.ndarray:
    """Return a column, without nulls and of a fitting type, of a table that a user may have chosen or replaced."""
    if name not in table.column_names:
        raise UserError(f"{path} has no column {name}: it has {', '.join(table.column_names)}")
    values = table[name]
    nulls = values.null_count
    if not fits(values.type) or nulls:
        kind = f"{values.type} with {nulls} nulls" if nulls else values.type
        raise UserError(f"{path}: column {name} is {kind}, which it cannot be")
    return values.to_numpy()


def is_number(kind: pa.DataType) -> bool:
    """Return True for types of integers and floats."""
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


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

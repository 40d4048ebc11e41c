"""Two runs' selections side by side: do they rank and pick the same samples?"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from raypkg.core.errors import UserError

from .columns import column_of, is_number
from .folder import RunFolder

CORESET = "coreset.parquet"
SCORES = "scores.parquet"


def compare(run: RunFolder, other: RunFolder) -> str:
    """Return overlap of the coresets and, where both runs computed scores, their rank correlation, in one line.

    Raises:
        UserError: a run is not finished, has no coreset or a damaged one, or they chose from different samples.
    """
    n = _samples(run)
    others_n = _samples(other)
    correlation = rank_correlation(run, other)
    if correlation is None and n != others_n:
        raise UserError(f"{run.name} chose from {n} samples and {other.name} from {others_n}: same data set?")
    picked = picks_of(run)
    others_picked = picks_of(other)
    common = len(np.intersect1d(picked, others_picked))
    chance = len(others_picked) / n  # the share that picks at random would have in common
    rho = "" if correlation is None else f"rank correlation of the scores {correlation:.3f}; "
    return (
        f"{run.name} against {other.name}: {rho}{common:,} of {len(picked):,} picks in common"
        f" ({common / len(picked):.1%}; by chance {chance:.1%})"
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation: Pearson's of the ranks, tied values sharing their mean rank.

    >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0])), 3)
    0.5
    """
    correlation = np.corrcoef(ranks(a), ranks(b))  # [2, 2]
    return float(correlation[0, 1])


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Return Kendall's τ-b: pairs in the same order less those in the other, over those that are not tied in each.

    >>> round(kendall(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])), 3)
    0.667
    """
    first = _orders(a)
    second = _orders(b)
    untied = np.sqrt(np.abs(first).sum() * np.abs(second).sum())
    if not untied:
        return float("nan")
    return float((first * second).sum() / untied)


def _orders(values: np.ndarray) -> np.ndarray:
    """Return the order of every pair: 1, −1, or 0 for a tie, [n, n]."""
    return np.sign(np.subtract.outer(values, values))


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value from 1 on; tied ones share their mean rank."""
    _, position, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)  # the highest rank among equal values
    mean = last - (count - 1) / 2
    return mean[position]


def _samples(run: RunFolder) -> int:
    if run.summary is None:
        raise UserError(f"{run.name} is not finished: there is no {CORESET} to compare")
    return run.summary["samples"]


def rank_correlation(run: RunFolder, other: RunFolder) -> float | None:
    """Return the rank correlation of the two runs' scores, or None where one computed none.

    Raises:
        UserError: they scored different samples, or a file is damaged.
    """
    if not (_has(run, SCORES) and _has(other, SCORES)):
        return None
    if not np.array_equal(_indices(run, SCORES), _indices(other, SCORES)):
        raise UserError(f"{run.name} and {other.name} scored different samples: same data set, seed and validation?")
    return spearman(_column(run, SCORES, "score", is_number), _column(other, SCORES, "score", is_number))


def picks_of(run: RunFolder) -> np.ndarray:
    """Return the positions in a run's coreset, int [k].

    Raises:
        UserError: it has none, or a damaged one.
    """
    if not _has(run, CORESET):
        raise UserError(f"{run.name} saved no coreset: there is no {CORESET} to compare")
    picked = _indices(run, CORESET)
    if not len(picked):
        raise UserError(f"{run.storage.root}/{CORESET} holds no sample")
    return picked


def _has(run: RunFolder, file: str) -> bool:
    run.check(file)  # one that is lost says so
    return file in run.storage.list()


def _indices(run: RunFolder, file: str) -> np.ndarray:
    return _column(run, file, "index", pa.types.is_integer)


def _column(run: RunFolder, file: str, name: str, fits: Callable[[pa.DataType], bool]) -> np.ndarray:
    return column_of(run.storage.read_table(file), name, f"{run.storage.root}/{file}", fits)

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


def _samples(run: RunFolder) -> int:
    if run.summary is None:
        raise UserError(f"{run.name} is not finished: there is no {CORESET} to compare")
    return run.summary["samples"]


def rank_correlation(run: RunFolder, other: RunFolder) -> float | None:
    """Return Spearman's rank correlation of two runs' scores, or None if one computed none.

    Raises:
        UserError: they scored different samples, or a file is damaged.
    """
    if not (_has(run, SCORES) and _has(other, SCORES)):
        return None
    if not np.array_equal(_indices(run, SCORES), _indices(other, SCORES)):
        raise UserError(f"{run.name} and {other.name} scored different samples: same data set, seed and validation?")
    from scipy.stats import spearmanr

    scores, others = (_column(each, SCORES, "score", is_number) for each in (run, other))
    return float(spearmanr(scores, others).statistic)


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

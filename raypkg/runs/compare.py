"""Two runs' selections side by side: do they rank and pick the same samples?"""

import numpy as np

from raypkg.core.errors import UserError

from .folder import RunFolder


def compare(run: RunFolder, other: RunFolder) -> str:
    """Return rank correlation of the scores and overlap of the coresets, in one line.

    Raises:
        UserError: a run has no scores or coreset, or they are of different samples.
    """
    scores, others = _column(run, "scores", "score"), _column(other, "scores", "score")
    if not np.array_equal(_column(run, "scores", "index"), _column(other, "scores", "index")):
        raise UserError(f"{run.name} and {other.name} scored different samples: same data set, seed and validation?")
    picked, others_picked = _column(run, "coreset", "index"), _column(other, "coreset", "index")
    common = len(np.intersect1d(picked, others_picked))
    chance = len(picked) * len(others_picked) / len(scores)
    return (
        f"{run.name} against {other.name}: rank correlation of the scores {spearman(scores, others):.3f};"
        f" {common:,} of {len(picked):,} picks in common ({common / len(picked):.1%};"
        f" by chance {chance / len(picked):.1%})"
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation: Pearson's of the ranks, tied values sharing their mean rank.

    >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0])), 3)
    0.5
    """
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, position, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[position]


def _column(run: RunFolder, table: str, column: str) -> np.ndarray:
    found = run.storage.read_table(f"{table}.parquet")
    if found is None:
        raise UserError(f"{run.name} has no {table}.parquet to compare: it did not select, or is not finished")
    return found[column].to_numpy()

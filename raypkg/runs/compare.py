"""Two runs' selections side by side: do they rank and pick the same samples?"""

from typing import Any

import numpy as np

from raypkg.core.errors import UserError

from .folder import RunFolder


def compare(run: RunFolder, other: RunFolder) -> str:
    """Return overlap of the coresets and, where both runs computed scores, their rank correlation, in one line.

    Raises:
        UserError: a run is not finished, or they chose from different samples.
    """
    n, others_n = _samples(run), _samples(other)
    scores, others = _table(run, "scores"), _table(other, "scores")
    correlation = ""
    if scores and others:
        if not scores["index"].equals(others["index"]):
            raise UserError(
                f"{run.name} and {other.name} scored different samples: same data set, seed and validation?"
            )
        rho = spearman(scores["score"].to_numpy(), others["score"].to_numpy())
        correlation = f"rank correlation of the scores {rho:.3f}; "
    elif n != others_n:
        raise UserError(f"{run.name} chose from {n} samples and {other.name} from {others_n}: same data set?")
    picked, others_picked = (_table(r, "coreset")["index"].to_numpy() for r in (run, other))
    common, chance = len(np.intersect1d(picked, others_picked)), len(others_picked) / n
    return (
        f"{run.name} against {other.name}: {correlation}{common:,} of {len(picked):,} picks in common"
        f" ({common / len(picked):.1%}; by chance {chance:.1%})"
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation: Pearson's of the ranks, tied values sharing their mean rank.

    >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0])), 3)
    0.5
    """
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Return Kendall's τ-b: pairs in the same order less those in the other, over those that are not tied in each.

    >>> round(kendall(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])), 3)
    0.667
    """
    first, second = (np.sign(np.subtract.outer(values, values)) for values in (a, b))  # [n, n]
    untied = np.sqrt(np.abs(first).sum() * np.abs(second).sum())
    return float((first * second).sum() / untied) if untied else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, position, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[position]


def _samples(run: RunFolder) -> int:
    if run.summary is None:
        raise UserError(f"{run.name} is not finished: there is no coreset.parquet to compare")
    return run.summary["samples"]


def _table(run: RunFolder, name: str) -> Any:
    return run.storage.read_table(f"{name}.parquet")

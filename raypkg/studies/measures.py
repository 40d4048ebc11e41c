"""Figures of a trial of a comparison: what its run says of itself, and how its selection compares with the baseline's.

A column of a table names one of these:

* a figure of the run's manifest or of what followed the run, such as ``pools`` or ``coreset_wrong_labels``;
* ``PHASE.KEY``: the bill of a phase, its evaluation apart, such as ``pretrain.total_seconds``;
* a name in ``MEASURES``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.settings import RunSettings
from raypkg.runs.agreement import SCORES, picks_of, rank_correlation
from raypkg.runs.folder import RunFolder

from .sweep_folder import AFTER

EVALUATE = "evaluate"  # the part of a phase that measures and is no part of the method
MAXIMA = ("memory", "device_memory")  # of a bill; the rest is added


def bill(summary: Mapping[str, Any], phase: str | None = None) -> dict[str, float]:
    """Return what a run cost without its evaluations.

    ``work`` is (forward + 2 · backward) / 3, a backward pass taken as two forward ones: in samples trained on.

    Args:
        summary: of the run.
        phase: only this one; None = all.
    """
    parts = [part for part in summary["phases"] if _is_of(part["phase"], phase)]
    total: dict[str, float] = {}
    for name in ("forward", "backward", "seconds", "total_seconds", "waited", *MAXIMA):
        values = [part.get(name, 0) for part in parts]
        total[name] = max(values, default=0) if name in MAXIMA else sum(values)
    return total | {"work": (total["forward"] + 2 * total["backward"]) / 3}


def _is_of(part: str, phase: str | None) -> bool:
    name, _, rest = part.partition(": ")
    return EVALUATE not in (name, rest) and phase in (None, name)


def figure(name: str, run: RunFolder, baseline: RunFolder | None) -> float | None:
    """Return a figure of a finished run; None where the run has none of that name.

    Args:
        name: see above.
        run: the trial's.
        baseline: the baseline's run of the same case and seed, or None where it is not done.
    """
    summary = run.summary or {}
    if name in MEASURES:
        return MEASURES[name](run, baseline)
    known = {**summary, **(run.storage.read_json(AFTER) or {})}
    phase, dot, key = name.partition(".")
    value = bill(summary, phase).get(key) if dot and _has_phase(summary, phase) else known.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def _has_phase(summary: Mapping[str, Any], phase: str) -> bool:
    return any(part["phase"].partition(": ")[0] == phase for part in summary["phases"])


def _spearman(run: RunFolder, baseline: RunFolder | None) -> float | None:
    """Return the rank correlation of the scores with the baseline's."""
    return None if baseline is None else rank_correlation(run, baseline)


def _overlap(run: RunFolder, baseline: RunFolder | None) -> float | None:
    """Return the share of the picks that the baseline picked too."""
    if baseline is None:
        return None
    try:
        picked = picks_of(run)
        theirs = picks_of(baseline)
    except UserError:  # one of them trained on all samples
        return None
    return len(np.intersect1d(picked, theirs)) / len(picked)


def _noise_auc(run: RunFolder, _: RunFolder | None) -> float | None:
    """Return how well the scores tell wrong labels: the chance that a wrong one scores higher than a right one."""
    from raypkg.experiments.samples import open_samples

    table = run.storage.read_table(SCORES)
    if table is None:
        return None
    parts = {name: run.config[name] for name in ("seed", "dataset")}
    split = open_samples(load_settings(RunSettings, parts)).data.train
    if split.truth is None:
        return None
    wrong = (split.y != split.truth).numpy()[table["index"].to_numpy()]
    return area_under_curve(table["score"].to_numpy(), wrong)


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Return the chance that a positive sample scores higher than a negative one, ties counting half.

    >>> area_under_curve(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True]))
    0.875
    """
    if positive.all() or not positive.any():
        return None
    from scipy.stats import mannwhitneyu

    others = scores[~positive]
    pairs_won = mannwhitneyu(scores[positive], others, method="asymptotic").statistic
    return float(pairs_won / (positive.sum() * len(others)))


def _critical_path(run: RunFolder, _: RunFolder | None) -> float | None:
    """Return the samples backward of pre-training that come one after another with as many workers as models."""
    summary = run.summary or {}
    samples = summary.get("pretrain_critical_samples")
    return bill(summary, "pretrain")["backward"] if samples is None else samples


MEASURES = {
    "spearman": _spearman,
    "overlap": _overlap,
    "noise_auc": _noise_auc,
    "critical_path": _critical_path,
}

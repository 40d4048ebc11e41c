"""Figures of trials: metrics and costs of their runs, means over seeds, paired differences, and Pareto fronts."""

import math
from collections.abc import Hashable, Iterable, Mapping
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeVar

import numpy as np

from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.settings import RunSettings
from raypkg.runs.folder import SCORES, RunFolder
from raypkg.runs.storage import Stored

from .tables import COSTS, MAXIMA, METRICS

AFTER = "after.json"  # in a trial's run folder: figures of the function that followed the finished run
EVALUATE = "evaluate"  # the part of a phase that measures, which is no cost of the method
CONFIDENCE = 0.95
DONE = "done"
HELD_OUT = "accuracy"  # the metric on held-out samples, by which rates are chosen
K = TypeVar("K", bound=Hashable)
Row = Mapping[str, Any]  # number, run, state, figures and settings of a trial


class TrialRun:
    """The run folder of a trial, read once; the run may not exist yet."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.rows = [row for row in folder.rows if row.get("main")]  # metrics of the main training
        self.epochs: int = max((row["epoch"] for row in self.rows), default=0)  # of it, so far
        self.summary = folder.summary  # the manifest of a finished run, or None
        # Until there is a manifest with the whole bill, the records of finished phases hold the cost of what came
        # before the main training. Rows have that of the main training, which may have a record as well.
        self._backward_before = 0
        if not self.summary:
            for file in folder.storage.list("phases"):
                record = folder.phase(file.removesuffix(".json")) or {}
                if not record.get("main"):
                    self._backward_before += sum(cost["backward"] for cost in record.get("costs", ()))

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Return epochs and a metric, where it was measured."""
        return [(row["epoch"], row[metric]) for row in self.rows if row.get(metric) is not None]

    def backward_curve(self, metric: str) -> list[tuple[float, float]]:
        """Return samples back-propagated over all phases so far and a metric; nothing for an unfinished run."""
        rows = [row for row in self.rows if row.get(metric) is not None and row.get("backward") is not None]
        if not (rows and self.summary):
            return []
        before = bill(self.summary)["backward"] - self.rows[-1]["backward"]
        return [(before + row["backward"], row[metric]) for row in rows]

    def figures(self) -> dict[str, Any]:
        """Return the last value of every metric, and the epochs of the main training."""
        last: dict[str, Any] = {"epochs": self.epochs}
        for values in (*self.rows, self.summary or {}):
            last |= {name: values[name] for name in METRICS if values.get(name) is not None}
        if self.summary:
            last["backward"] = sum(phase["backward"] for phase in self.summary["phases"])
        elif "backward" in last:
            last["backward"] += self._backward_before
        return last


def bill(summary: Mapping[str, Any], phase: str | None = None) -> dict[str, float]:
    """Return the cost of a run or of one of its phases, without evaluations.

    ``work`` is (forward + 2 · backward) / 3 samples: a backward pass counts as two forward passes.
    """
    parts = []
    for part in summary["phases"]:
        name, _, rest = part["phase"].partition(": ")
        if EVALUATE not in (name, rest) and phase in (None, name):
            parts.append(part)
    total: dict[str, float] = {}
    for name in COSTS[:-1]:
        values = [part.get(name, 0) for part in parts]
        total[name] = max(values, default=0) if name in MAXIMA else sum(values)
    return total | {"work": (total["forward"] + 2 * total["backward"]) / 3}


# Columns of tables


def column_figure(name: str, run: TrialRun, baseline: TrialRun | None) -> float | None:
    """Return the figure that a column of a table names, or None if the finished run has none of that name.

    ``spearman`` and ``overlap`` compare scores and picks with the baseline of the same case and seed. Others are the
    cost of a phase, such as ``pretrain.total_seconds``, and figures of the manifest or of the function that followed.
    """
    from raypkg.experiments.coreset_files import area_under_curve, picks_of, rank_correlation
    from raypkg.experiments.samples import open_samples

    summary = run.summary or {}
    phase, dot, key = name.partition(".")
    if name == "spearman":
        return rank_correlation(run.folder, baseline.folder) if baseline else None
    if name == "overlap":  # the share of the picks that are also the baseline's
        if baseline is None:
            return None
        try:
            picked, others = (picks_of(each.folder) for each in (run, baseline))
        except UserError:  # one of them trained on all samples
            return None
        return len(np.intersect1d(picked, others)) / len(picked)
    if name == "noise_auc":  # the area under the ROC curve of the scores as detectors of wrong labels
        table = run.folder.storage.read_table(SCORES)
        if table is None:
            return None
        parts = {name: run.folder.config[name] for name in ("seed", "dataset")}
        split = open_samples(load_settings(RunSettings, parts)).data.train
        if split.truth is None:
            return None
        wrong = (split.y != split.truth).numpy()[table["index"].to_numpy()]
        return area_under_curve(table["score"].to_numpy(), wrong)
    if name == "critical_path":  # pre-training's samples backward, with a worker for every model
        samples = summary.get("pretrain_critical_samples")
        return bill(summary, "pretrain")["backward"] if samples is None else samples
    if dot and any(part["phase"].partition(": ")[0] == phase for part in summary["phases"]):
        value = bill(summary, phase).get(key)
    else:
        value = {**summary, **(run.folder.storage.read_json(AFTER, Stored) or {})}.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


# Over seeds


class Estimate(NamedTuple):
    """A mean over seeds."""

    mean: float
    std: float  # standard deviation with n − 1; NaN for one seed


class Difference(NamedTuple):
    """A mean of differences from the baseline of the same seeds."""

    mean: float
    half: float  # half the width of the 95 % interval, t · s / √n; NaN for one seed


def estimated(values: Iterable[float]) -> Estimate | None:
    """Return mean and standard deviation, or None without any value.

    >>> estimated([1.0, 2.0, 3.0])
    Estimate(mean=2.0, std=1.0)
    """
    known = list(values)
    if not known:
        return None
    return Estimate(fmean(known), stdev(known) if len(known) > 1 else math.nan)


def half_interval(values: list[float], comparisons: int) -> float:
    """Return half of Student's interval for a mean; the 95 % hold for all comparisons together (Bonferroni)."""
    from scipy.stats import t

    n = len(values)
    quantile = float(t.ppf(1 - (1 - CONFIDENCE) / comparisons / 2, n - 1))
    return quantile * stdev(values) / math.sqrt(n)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], comparisons: int = 1
) -> Difference | None:
    """Return the mean difference from the baseline over the seeds of both, with its interval.

    >>> paired_difference({0: 2.0, 1: 4.0, 2: 9.0}, {0: 1.0, 1: 2.0}).mean
    1.5
    """
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if not differences:
        return None
    half = half_interval(differences, comparisons) if len(differences) > 1 else math.nan
    return Difference(fmean(differences), half)


# Order of trials


def ranked(results: Iterable[Row], metric: str, mode: str) -> list[Row]:
    """Return trials from best to worst, of equal ones the cheapest first; done trials precede all others."""
    sign = -1 if mode == "max" else 1

    def key(row: Row) -> tuple[int, float, int]:
        if row.get(metric) is None:
            return 2, 0.0, 0
        return int(row["state"] != DONE), sign * row[metric], row.get("backward", 0)

    return sorted(results, key=key)


def front(points: Mapping[K, tuple[float, float]], mode: str) -> list[K]:
    """Return the Pareto front of (cost, value) points, the cheapest first.

    >>> front({"a": (100, 0.8), "b": (200, 0.9), "c": (150, 0.7), "d": (300, 0.9)}, "max")
    ['a', 'b']
    """
    sign = 1 if mode == "max" else -1
    best = -math.inf
    keys = []
    for key, (_, value) in sorted(points.items(), key=lambda point: (point[1][0], -sign * point[1][1])):
        if sign * value > best:  # better than everything cheaper
            best = sign * value
            keys.append(key)
    return keys


def measured_points(results: Iterable[Row], metric: str) -> dict[int, tuple[float, float]]:
    """Return samples backward and metric of the done trials, by number."""
    points = {}
    for row in results:
        if row["state"] == DONE and row.get(metric) is not None and row.get("backward") is not None:
            points[row["trial"]] = (row["backward"], row[metric])
    return points

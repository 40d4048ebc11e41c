"""How a sweep stands: the trials in order, the best of them, the Pareto front, and what its proxy was worth."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypkg.runs.agreement import kendall
from raypkg.runs.folder import RunFolder
from raypkg.runs.storage import Storage

from .figures import TrialRun
from .sweep_folder import DONE, SweepFolder

ONLY = "dataset.only"  # the setting that narrows trials to the sweep's coreset
Row = Mapping[str, Any]  # of a trial: number, run, state, figures and what it sets


@dataclass(frozen=True)
class Standing:
    """What has come of a sweep so far.

    Attributes:
        runs: what the run folder of each trial held, by number.
        results: a row for each trial, in the order of their numbers.
        ranked: the same rows, the best first.
        front: numbers of the trials on the Pareto front of metric against samples back-propagated.
        best: row of the best trial that is done on all samples, or None.
        proxy: how well the coreset of the sweep ranked the trials, or None.
    """

    runs: Mapping[int, TrialRun]
    results: Sequence[Row]
    ranked: Sequence[Row]
    front: Sequence[int]
    best: Row | None
    proxy: Mapping[str, Any] | None


def standing_of(sweep: SweepFolder) -> Standing:
    """Read the run folder of each trial once, and judge what is there."""
    runs = sweep.runs()
    results = sweep.results(runs)
    order = ranked(results, sweep.metric, sweep.mode)
    whole = (row for row in order if _is_whole(row))
    return Standing(
        runs=runs,
        results=results,
        ranked=order,
        front=front(results, sweep.metric, sweep.mode),
        best=next((row for row in whole if row.get(sweep.metric) is not None), None),
        proxy=judge_proxy(sweep, results),
    )


def ranked(results: Iterable[Row], metric: str, mode: str) -> list[Row]:
    """Return the trials, the best and of equal ones the cheapest first: done, then stopped, then on a proxy."""
    sign = -1 if mode == "max" else 1

    def key(row: Row) -> tuple[int, float, int]:
        if row.get(metric) is None:
            return 4, 0.0, 0
        group = (row["state"] != DONE) + 2 * row.get("proxy", False)
        return group, sign * row[metric], row.get("backward", 0)

    return sorted(results, key=key)


def front(results: Iterable[Row], metric: str, mode: str, cost: str = "backward") -> list[int]:
    """Return the numbers of the done trials that no other beats in both metric and cost, the cheapest first.

    >>> rows = [{"trial": n, "state": "done", "accuracy": a, "backward": b} for n, (a, b) in
    ...         enumerate([(0.8, 100), (0.9, 200), (0.7, 150), (0.9, 300)])]
    >>> front(rows, "accuracy", "max")
    [0, 1]
    """
    sign = 1 if mode == "max" else -1
    rows = [row for row in results if _is_whole(row)]
    rows = [row for row in rows if row.get(metric) is not None and row.get(cost) is not None]
    rows.sort(key=lambda row: (row[cost], -sign * row[metric]))
    trials = []
    best = float("-inf")
    for row in rows:
        value = sign * row[metric]
        if value > best:  # than all that cost less
            best = value
            trials.append(row["trial"])
    return trials


def judge_proxy(sweep: SweepFolder, results: Sequence[Row]) -> dict[str, Any] | None:
    """Return how well the coreset ranked the trials that were done on all samples too, and what it cost.

    ``backward`` is what the sweep cost with the coreset's own run, ``backward_without`` what as many trials on all
    samples would have cost at the mean of those that were.
    """
    if not sweep.on_proxy:
        return None
    metric = sweep.metric
    varied = sweep.order["varied"]
    on_proxy = [row for row in results if row.get("proxy") and row.get(metric) is not None]
    predictions = {_point(row, varied): row[metric] for row in on_proxy}
    whole = [row for row in results if _is_whole(row)]
    predicted = []
    reached = []
    for row in whole:
        point = _point(row, varied)
        if point in predictions:
            predicted.append(predictions[point])
            reached.append(row[metric])
    if len(reached) < 2:
        return None
    mean = np.mean([row["backward"] for row in whole])
    return {
        "trials": len(reached),
        "kendall": kendall(np.array(predicted), np.array(reached)),
        "backward": _selection_cost(sweep) + sum(row.get("backward", 0) for row in results),
        "backward_without": round(sweep.order["samples"] * mean),
    }


def _is_whole(row: Row) -> bool:
    """Say whether a trial is done, and on all samples."""
    return row["state"] == DONE and not row.get("proxy")


def _point(row: Row, varied: Iterable[str]) -> tuple[str, ...]:
    """Return where in the space a trial is."""
    return tuple(str(row.get(name)) for name in varied)


def _selection_cost(sweep: SweepFolder) -> int:
    """Return the samples that the run which made the coreset back-propagated."""
    folder, _, _ = sweep.order["fixed"][ONLY].rpartition("/")
    run = TrialRun(RunFolder(Storage(folder)))
    return run.figures()["backward"]

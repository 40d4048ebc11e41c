"""How a sweep stands: the trials in order, the best of them, the Pareto front."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .figures import TrialRun
from .sweep_folder import DONE, SweepFolder

Row = Mapping[str, Any]  # of a trial: number, run, state, figures and what it sets


@dataclass(frozen=True)
class Standing:
    """What has come of a sweep so far.

    Attributes:
        runs: what the run folder of each trial held, by number.
        results: a row for each trial, in the order of their numbers.
        ranked: the same rows, the best first.
        front: numbers of the trials on the Pareto front of metric against samples back-propagated.
        best: row of the best trial that is done or None.
    """

    runs: Mapping[int, TrialRun]
    results: Sequence[Row]
    ranked: Sequence[Row]
    front: Sequence[int]
    best: Row | None


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
    )


def ranked(results: Iterable[Row], metric: str, mode: str) -> list[Row]:
    """Return the trials, the best and of equal ones the cheapest first: done, then stopped."""
    sign = -1 if mode == "max" else 1

    def key(row: Row) -> tuple[int, float, int]:
        if row.get(metric) is None:
            return 2, 0.0, 0
        return row["state"] != DONE, sign * row[metric], row.get("backward", 0)

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


def _is_whole(row: Row) -> bool:
    return row["state"] == DONE

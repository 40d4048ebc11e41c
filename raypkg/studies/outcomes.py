"""What came of a comparison: the runs of each row in each case, their figures by seed, and how rows compare."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from .figures import METRICS, TrialRun
from .measures import bill, figure
from .paired import Difference, Estimate, estimated, paired_difference
from .standing import front
from .sweep_folder import DONE, SweepFolder
from .tables import Table, renamed

COSTS = ("forward", "backward", "work", "seconds", "memory")
CURVE = "accuracy"  # what curves and goals are about, unless a goal names another metric
By = Mapping[int, float]  # a figure by seed


@dataclass(frozen=True)
class GoalCost:
    """What it cost to reach a goal.

    Attributes:
        backward: samples back-propagated until then, over the seeds that reached it.
        seeds: how many did.
        of: how many could have.
    """

    backward: Estimate | None
    seeds: int
    of: int


@dataclass(frozen=True)
class Line:
    """A row of a table in one of its cases.

    Attributes:
        row: its label.
        seeds: those that are done.
        of: how many there are to be.
        value: of the metric.
        difference: from the baseline; None of the baseline itself.
        costs: forward, backward, work, seconds and memory.
        goals: by metric and value.
        columns: further figures by heading.
        curve: samples back-propagated and mean held-out accuracy, epoch by epoch.
        on_front: whether no other row has a better value for no more work.
    """

    row: str
    seeds: Sequence[int]
    of: int
    value: Estimate | None
    difference: Difference | None
    costs: Mapping[str, Estimate]
    goals: Mapping[tuple[str, float], GoalCost]
    columns: Mapping[str, Estimate | None]
    curve: Sequence[tuple[float, float]]
    on_front: bool = False


@dataclass(frozen=True)
class Case:
    """A case of a table with a line for each row."""

    label: str
    lines: Sequence[Line]


class Outcomes:
    """The runs of a comparison, each read once.

    Args:
        sweep: its folder.
        table: all of it or some rows, cases and seeds.
    """

    def __init__(self, sweep: SweepFolder, table: Table):
        self.sweep = sweep
        self.table = table
        self.numbers = numbers_of(sweep)
        self._runs: dict[int, TrialRun] = {}
        self._states: dict[int, str] = {}

    @cached_property
    def cases(self) -> list[Case]:
        """Every case, its rows compared."""
        return [Case(case, self._with_front(self._lines(case))) for case in self.table.cases]

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield each trial as a row of ``results.parquet``."""
        table = self.table
        for case, row, seed in trials_of_table(table):
            number = self.numbers.get(run_identity(table, case, row, seed))
            if number is None:
                continue
            run = self._run(number)
            yield {
                "trial": number,
                "run": self.sweep.run_name(number),
                "state": self._state(number),
                "error": self.sweep.trials[number]["error"],
                "case": case,
                "row": row,
                "seed": seed,
                **run.figures(),
                **(bill(run.summary) if run.summary else {}),
                **{name: self._figure(name, case, row, seed) for name in table.columns.values()},
            }

    @cached_property
    def summaries(self) -> list[dict[str, Any]]:
        """The manifest of every finished run, each once, whichever rows it stands for."""
        trials = {run_identity(self.table, *trial) for trial in trials_of_table(self.table)}
        runs = [self._run(number) for trial, number in self.numbers.items() if trial in trials]
        return [run.summary for run in runs if run.summary]

    def _lines(self, case: str) -> list[Line]:
        baseline = self._values(case, self.table.baseline)
        return [self._line(case, row, baseline) for row in self.table.rows]

    def _line(self, case: str, row: str, baseline: By) -> Line:
        table = self.table
        values = self._values(case, row)
        runs = {seed: self._done(case, row, seed) for seed in values}
        bills = [bill(run.summary) for run in runs.values() if run and run.summary]
        costs = {name: estimated(each[name] for each in bills) for name in COSTS}
        columns = {}
        for heading, name in table.columns.items():
            found = [self._figure(name, case, row, seed) for seed in values]
            columns[heading] = estimated(value for value in found if value is not None)
        known = [run for run in runs.values() if run]
        return Line(
            row=row,
            seeds=tuple(values),
            of=len(table.seeds),
            value=estimated(values.values()),
            difference=None if row == table.baseline else paired_difference(values, baseline),
            costs={name: cost for name, cost in costs.items() if cost},
            goals={(metric, goal): goal_cost(known, metric, goal) for metric, goal in goals_of(table)},
            columns=columns,
            curve=mean_curve(known),
        )

    def _with_front(self, lines: Sequence[Line]) -> list[Line]:
        """Mark the rows that no other beats in both the metric and the work."""
        metric = self.table.metric
        rows = [
            {"trial": place, "state": DONE, metric: line.value.mean, "work": line.costs["work"].mean}
            for place, line in enumerate(lines)
            if line.value
        ]
        best = set(front(rows, metric, self.sweep.mode, "work"))
        return [replace(line, on_front=place in best) for place, line in enumerate(lines)]

    def _values(self, case: str, row: str) -> dict[int, float]:
        """Return the metric of each seed that is done."""
        values = {}
        for seed in self.table.seeds:
            run = self._done(case, row, seed)
            value = run.figures().get(self.table.metric) if run else None
            if value is not None:
                values[seed] = float(value)
        return values

    def _figure(self, name: str, case: str, row: str, seed: int) -> float | None:
        if self._done(case, row, seed) is None:
            return None
        number = self.numbers[run_identity(self.table, case, row, seed)]
        baseline = None
        if self._done(case, self.table.baseline, seed):
            other = self.numbers[run_identity(self.table, case, self.table.baseline, seed)]
            baseline = self.sweep.run(other)
        return figure(name, self.sweep.run(number), baseline)

    def _done(self, case: str, row: str, seed: int) -> TrialRun | None:
        """Return the run of a trial that is done, or None."""
        number = self.numbers.get(run_identity(self.table, case, row, seed))
        if number is None or self._state(number) != DONE:
            return None
        return self._run(number)

    def _state(self, number: int) -> str:
        if number not in self._states:
            self._states[number] = self.sweep.state(number)
        return self._states[number]

    def _run(self, number: int) -> TrialRun:
        if number not in self._runs:
            self._runs[number] = TrialRun(self.sweep.run(number))
        return self._runs[number]


def trials_of_table(table: Table) -> Iterator[tuple[str, str, int]]:
    """Yield case, row and seed of every trial, the first seed of all rows first: a stopped comparison has most rows."""
    for seed in table.seeds:
        for case in table.cases:
            for row in table.rows:
                yield case, row, seed


def run_identity(table: Table, case: str, row: str, seed: int) -> str:
    """Return a text that is the same for trials that are the same run: what it sets, and what follows it."""
    return _identity_of(table.trial(case, row, seed), table.after.get(row))


def numbers_of(sweep: SweepFolder) -> dict[str, int]:
    """Return the number of each trial of a comparison by its run_identity."""
    return {
        _identity_of(trial["settings"], trial.get("after")): number
        for number, trial in enumerate(sweep.trials)
        if trial["settings"]
    }


def _identity_of(values: Mapping[str, Any], after: str | None) -> str:
    return json.dumps([dict(values), after and renamed(after)], sort_keys=True)


def goals_of(table: Table) -> list[tuple[str, float]]:
    """Return every goal as metric and value."""
    return [(metric, float(value)) for metric, values in table.goals.items() for value in values]


def goal_cost(runs: Sequence[TrialRun], metric: str, goal: float) -> GoalCost:
    """Return what it cost to reach a goal, over the runs that measured the metric."""
    curves = [_backward_curve(run, metric) for run in runs]
    curves = [curve for curve in curves if curve]
    sign = 1 if METRICS[metric].mode == "max" else -1
    costs = []
    for curve in curves:
        enough = (backward for backward, value in curve if sign * value >= sign * goal)
        first = next(enough, None)
        if first is not None:
            costs.append(first)
    return GoalCost(estimated(costs), len(costs), len(curves))


def mean_curve(runs: Sequence[TrialRun]) -> list[tuple[float, float]]:
    """Return the mean learning curve of runs, as far as all of them go."""
    curves = [curve for run in runs if (curve := _backward_curve(run, CURVE))]
    if not curves:
        return []
    shortest = min(map(len, curves))
    stacked = np.array([curve[:shortest] for curve in curves])  # [runs, epochs, 2]
    return [(float(backward), float(value)) for backward, value in stacked.mean(0)]


def _backward_curve(run: TrialRun, metric: str) -> list[tuple[float, float]]:
    """Return samples back-propagated, over all phases so far, and a metric, where it was measured."""
    rows = [row for row in run.rows if row.get(metric) is not None and row.get("backward") is not None]
    if not (rows and run.summary):
        return []
    before = bill(run.summary)["backward"] - run.rows[-1]["backward"]  # in the phases before the main training
    return [(before + row["backward"], row[metric]) for row in rows]

"""Outcomes of a comparison: figures of each row and case over the seeds, against the baseline, and verdicts.

Verdicts say whether a row pays against the baseline at equal total work. Work counts everything that a run computed,
selection included: (forward + 2 · backward) / 3 samples, evaluation apart. Rows that are the baseline with more or less
training give, for each seed, the baseline's metric as a function of work, linear in log(work) between them. A row pays
if its paired differences from it are positive beyond doubt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from .figures import (
    DONE,
    HELD_OUT,
    METRICS,
    Difference,
    Estimate,
    TrialRun,
    bill,
    column_figure,
    estimated,
    front,
    half_interval,
    paired_difference,
)
from .study import Study
from .tables import NOT_PAID, PAID, UNKNOWN, Table

COSTS = ("forward", "backward", "work", "seconds", "memory")
CURVE = "accuracy"  # the metric of the learning curves
EQUAL = 0.02  # relative difference of equal work
Point = tuple[float, float]  # work and metric of a run


class Verdict(NamedTuple):
    """A verdict with its reason."""

    word: str
    # Mean of the paired differences at equal work, and half of its interval; NaN if unknown.
    mean: float = math.nan
    half: float = math.nan
    seeds: int = 0


@dataclass(frozen=True)
class GoalCost:
    """The cost of reaching a goal."""

    backward: Estimate | None  # samples back-propagated until then, over the seeds that reached it
    seeds: int  # that reached it
    of: int  # seeds that measured the metric


@dataclass(frozen=True)
class Line:
    """A row of a table in one case."""

    row: str
    seeds: Sequence[int]  # done ones
    of: int  # number of requested seeds
    value: Estimate | None  # of the metric
    difference: Difference | None  # from the baseline; None for the baseline itself
    verdict: Verdict | None  # at equal total work; None for the baseline's rows
    costs: Mapping[str, Estimate]  # by the names in COSTS
    goals: Mapping[tuple[str, float], GoalCost]  # by metric and value
    columns: Mapping[str, Estimate | None]  # by heading
    curve: Sequence[tuple[float, float]]  # samples back-propagated and mean held-out accuracy, epoch by epoch
    rate: float | None = None  # the best of the table's rates
    on_front: bool = False  # the Pareto front of metric against work


@dataclass(frozen=True)
class Case:
    """A case of a table with a line for each row."""

    label: str
    lines: Sequence[Line]


class Outcomes:
    """The runs of a comparison, each read once; ``table`` has all rows, cases and seeds, or some of them."""

    def __init__(self, study: Study, table: Table):
        self.study = study
        self.table = table
        numbers = study.numbers()
        found = {place: numbers.get(table.identity(*place)) for place in table.places()}
        known = {number for number in found.values() if number is not None}
        self.runs = {number: TrialRun(study.run(number)) for number in sorted(known)}
        self._done = {number for number in known if study.state(number) == DONE}
        self.numbers: dict[tuple[str, str, int], int | None] = {}  # of the trials at the best rate
        self.rates: dict[tuple[str, str], float | None] = {}
        for case, row, _, _ in found:
            trials = {rate: [found[case, row, seed, rate] for seed in table.seeds] for rate in table.rates or (None,)}
            best = max(trials, key=lambda rate: self._held_out(trials[rate])) if table.rates else None
            self.rates[case, row] = table.trial(case, row, 0, best).get("train.lr")  # the row's own has priority
            self.numbers |= {(case, row, seed): n for seed, n in zip(table.seeds, trials[best], strict=True)}

    def _held_out(self, numbers: Sequence[int | None]) -> float:
        """Return the mean held-out accuracy of trials; −∞ unless all are done."""
        done = [self.runs[n].figures().get(HELD_OUT) for n in numbers if n is not None and n in self._done]
        known = [value for value in done if value is not None]
        return fmean(known) if len(known) == len(numbers) else -math.inf

    @cached_property
    def cases(self) -> list[Case]:
        """The cases, their rows compared."""
        cases = []
        for case in self.table.cases:
            baseline = self._values(case, self.table.baseline)
            lines = [self._line(case, row, baseline) for row in self.table.rows]
            points = {n: (line.costs["work"].mean, line.value.mean) for n, line in enumerate(lines) if line.value}
            best = front(points, METRICS[self.table.metric].mode)
            cases.append(Case(case, [replace(line, on_front=place in best) for place, line in enumerate(lines)]))
        return cases

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield a row of results for each case, row and seed with a trial."""
        for (case, row, seed), number in self.numbers.items():
            if number is None:
                continue
            run = self.runs[number]
            record = self.study.row(number, run) | {"case": case, "row": row, "seed": seed}
            record |= bill(run.summary) if run.summary else {}
            record |= {name: self._figure(name, case, row, seed) for name in self.table.columns.values()}
            yield record

    def verdicts(self) -> list[dict[str, Any]]:
        """Return the verdict on each row and case, as written to a file."""
        found = []
        for case in self.cases:
            for line in case.lines:
                if verdict := line.verdict:
                    half, mean = (value if math.isfinite(value) else None for value in (verdict.half, verdict.mean))
                    found.append(
                        {"case": case.label, "row": line.row, "verdict": verdict.word}
                        | {"difference": mean, "half_interval": half, "seeds": verdict.seeds}
                    )
        return found

    def _line(self, case: str, row: str, baseline: Mapping[int, float]) -> Line:
        table = self.table
        values = self._values(case, row)
        compared = len(table.cases) * (len(table.rows) - 1)
        runs = [run for seed in values if (run := self._finished(case, row, seed))]
        bills = [bill(run.summary) for run in runs if run.summary]
        costs = {name: estimated(each[name] for each in bills) for name in COSTS}
        columns = {}
        for heading, name in table.columns.items():
            found = [self._figure(name, case, row, seed) for seed in values]
            columns[heading] = estimated(value for value in found if value is not None)
        return Line(
            row=row,
            seeds=tuple(values),
            of=len(table.seeds),
            value=estimated(values.values()),
            difference=None if row == table.baseline else paired_difference(values, baseline, compared),
            verdict=self._verdict(case, row),
            costs={name: cost for name, cost in costs.items() if cost},
            goals={goal: goal_cost(runs, *goal) for goal in table.all_goals()},
            columns=columns,
            curve=mean_curve(runs),
            rate=self.rates[case, row],
        )

    def _verdict(self, case: str, row: str) -> Verdict | None:
        """Return the verdict on a row; by the table's ``gain`` it is against 1, otherwise at the baseline's work."""
        table = self.table
        if table.gain:
            gains = {seed: self._figure(table.gain, case, row, seed) for seed in table.seeds}
            points = {seed: (1.0, gain) for seed, gain in gains.items() if gain is not None}
            verdicts = len(table.cases) * len(table.rows)
            return judge(points, {seed: [(1.0, 1.0)] for seed in points}, mode="max", verdicts=verdicts)
        baselines = {table.baseline, *table.as_baseline}
        if row in baselines:
            return None
        curves: dict[int, list[Point]] = {seed: [] for seed in table.seeds}
        for label in baselines:
            for seed, point in self._points(case, label).items():
                curves[seed].append(point)
        verdicts = len(table.cases) * (len(table.rows) - len(baselines))
        return judge(self._points(case, row), curves, mode=METRICS[table.metric].mode, verdicts=verdicts)

    def _points(self, case: str, row: str) -> dict[int, Point]:
        """Return total work and metric by done seed."""
        points = {}
        for seed, value in self._values(case, row).items():
            run = self._finished(case, row, seed)
            if run and run.summary:
                points[seed] = (bill(run.summary)["work"], value)
        return points

    def _values(self, case: str, row: str) -> dict[int, float]:
        """Return the metric by done seed."""
        values = {}
        for seed in self.table.seeds:
            run = self._finished(case, row, seed)
            value = run.figures().get(self.table.metric) if run else None
            if value is not None:
                values[seed] = float(value)
        return values

    def _figure(self, name: str, case: str, row: str, seed: int) -> float | None:
        run = self._finished(case, row, seed)
        over, slash, key = name.rpartition(" / ")
        reference = self._finished(case, over or self.table.reference or self.table.baseline, seed)
        if slash and run and reference and run.summary and reference.summary:
            return bill(reference.summary)[key] / bill(run.summary)[key]
        return column_figure(name, run, reference) if run else None

    def _finished(self, case: str, row: str, seed: int) -> TrialRun | None:
        """Return the run of a done trial, or None."""
        number = self.numbers[case, row, seed]
        return self.runs[number] if number is not None and number in self._done else None


def goal_cost(runs: Sequence[TrialRun], metric: str, goal: float) -> GoalCost:
    """Return the cost of reaching a goal, over the runs that measured the metric."""
    sign = 1 if METRICS[metric].mode == "max" else -1
    curves = [curve for run in runs if (curve := run.backward_curve(metric))]
    costs = []
    for curve in curves:
        reached = [backward for backward, value in curve if sign * value >= sign * goal]
        costs += reached[:1]
    return GoalCost(estimated(costs), len(costs), len(curves))


def mean_curve(runs: Sequence[TrialRun]) -> list[tuple[float, float]]:
    """Return the mean learning curve of runs, to the end of the shortest."""
    curves = [curve for run in runs if (curve := run.backward_curve(CURVE))]
    if not curves:
        return []
    shortest = min(map(len, curves))
    stacked = np.array([curve[:shortest] for curve in curves])  # [runs, epochs, 2]
    return [(float(backward), float(value)) for backward, value in stacked.mean(0)]


def judge(row: Mapping[int, Point], baseline: Mapping[int, Iterable[Point]], *, mode: str, verdicts: int) -> Verdict:
    """Return the verdict on a row, from its runs and the baseline's by seed.

    A table of rows without an effect has a verdict other than unknown with a probability of at most 5 %: intervals are
    for all its ``verdicts`` together. A row with more work than any baseline can only fail, one with less can only pay.

    >>> rows = {seed: (200.0, 0.9 + 0.001 * seed) for seed in range(3)}
    >>> random = {seed: [(100.0, 0.7), (400.0, 0.8)] for seed in range(3)}
    >>> judge(rows, random, mode="max", verdicts=1).word
    'paid'
    """
    sign = 1 if mode == "max" else -1
    differences = []
    can_fail = can_pay = True
    for seed, (work, value) in row.items():
        curve = sorted(baseline.get(seed, ()))
        if not curve:
            continue
        works, values = zip(*curve, strict=True)
        can_pay &= work <= works[-1] * (1 + EQUAL)
        can_fail &= work >= works[0] * (1 - EQUAL)
        expected = float(np.interp(math.log(work), np.log(works), values))
        differences.append(sign * (value - expected))
    count = len(differences)
    if count < 2:
        return Verdict(UNKNOWN, seeds=count)
    mean = fmean(differences)
    half = half_interval(differences, verdicts)
    word = UNKNOWN
    if mean > half and can_pay:
        word = PAID
    elif mean < -half and can_fail:
        word = NOT_PAID
    return Verdict(word, sign * mean, half, count)

"""Outcomes of a comparison: figures of each row and case over the seeds, against the baseline, and verdicts.

Verdicts say whether a row pays against the baseline at equal total work. Work counts everything that a run computed,
selection included: (forward + 2 · backward) / 3 samples, evaluation apart. Rows that are the baseline with more or less
training give, for each seed, the baseline's metric as a function of work, linear in log(work) between them. A row pays
if its paired differences from it are positive beyond doubt.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeVar

import numpy as np

from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.settings import RunSettings
from raypkg.runs.folder import SCORES
from raypkg.runs.storage import Stored

from .study import AFTER, DONE, Study, TrialRun, bill
from .tables import METRICS, NOT_PAID, PAID, UNKNOWN, Table

CONFIDENCE = 0.95
HELD_OUT = "accuracy"  # on held-out samples, the metric of the learning curves; rates are chosen by it
SHOWN = ("forward", "backward", "work", "seconds", "memory")  # costs of a line
EQUAL = 0.02  # relative difference of equal work
K = TypeVar("K", bound=Hashable)
Point = tuple[float, float]  # work and metric of a run


class Estimate(NamedTuple):
    """A mean over seeds, of a figure or of its differences from the baseline of the same seeds."""

    mean: float
    spread: float  # NaN for one seed


class Verdict(NamedTuple):
    """A verdict with its reason."""

    word: str
    # Mean of the paired differences at equal work, and half of its interval; NaN if unknown.
    mean: float = math.nan
    half: float = math.nan
    seeds: int = 0


class GoalCost(NamedTuple):
    """The cost of reaching a goal."""

    backward: Estimate | None  # samples back-propagated until then, over the seeds that reached it
    seeds: int  # that reached it
    of: int  # seeds that measured the metric


class Line(NamedTuple):
    """A row of a table in one case."""

    row: str
    seeds: Sequence[int]  # done ones
    value: Estimate | None  # of the metric
    difference: Estimate | None  # from the baseline; None for the baseline itself
    verdict: Verdict | None  # at equal total work; None for the baseline's rows
    costs: Mapping[str, Estimate]  # by the names in SHOWN
    goals: Mapping[tuple[str, float], GoalCost]  # by metric and value
    columns: Mapping[str, Estimate | None]  # by heading
    curve: Sequence[tuple[float, float]]  # samples back-propagated and mean held-out accuracy, epoch by epoch
    rate: float | None  # the best of the table's rates
    on_front: bool = False  # the Pareto front of metric against work


class Case(NamedTuple):
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
        done = {number: self.runs[number] for number in known if study.state(number) == DONE}

        def held_out(numbers: Sequence[int | None]) -> float:
            """Return the mean held-out accuracy of trials; −∞ unless all are done."""
            runs = [done[number] for number in numbers if number is not None and number in done]
            values = [run.figures()[HELD_OUT] for run in runs if HELD_OUT in run.figures()]
            return fmean(values) if len(values) == len(numbers) else -math.inf

        self.numbers: dict[tuple[str, str, int], int | None] = {}  # of the trials at the best rate
        self.rates: dict[tuple[str, str], float | None] = {}
        for case, row in dict.fromkeys((case, row) for case, row, _, _ in found):
            trials = {rate: [found[case, row, seed, rate] for seed in table.seeds] for rate in table.rates or (None,)}
            best = max(trials, key=lambda rate: held_out(trials[rate])) if table.rates else None
            self.rates[case, row] = table.trial(case, row, 0, best).get("train.lr")  # the row's own has priority
            self.numbers |= {(case, row, seed): n for seed, n in zip(table.seeds, trials[best], strict=True)}
        self.done = {place: done[n] for place, n in self.numbers.items() if n is not None and n in done}

    @cached_property
    def cases(self) -> list[Case]:
        """The cases, their rows compared."""
        cases = []
        for case in self.table.cases:
            baseline = self._values(case, self.table.baseline)
            lines = [self._line(case, row, baseline) for row in self.table.rows]
            points = {n: (line.costs["work"].mean, line.value.mean) for n, line in enumerate(lines) if line.value}
            best = front(points, METRICS[self.table.metric].mode)
            cases.append(Case(case, [line._replace(on_front=place in best) for place, line in enumerate(lines)]))
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
        runs = [self.done[case, row, seed] for seed in values]
        bills = [bill(run.summary) for run in runs if run.summary]
        costs = {name: estimated(each[name] for each in bills) for name in SHOWN}
        columns = {}
        for heading, name in table.columns.items():
            found = [self._figure(name, case, row, seed) for seed in values]
            columns[heading] = estimated(value for value in found if value is not None)
        goals = {}
        for metric, wanted in table.goals.items():
            sign = 1 if METRICS[metric].mode == "max" else -1
            curves = [curve for run in runs if (curve := run.backward_curve(metric))]
            for goal in wanted:
                reached = [[backward for backward, value in curve if sign * value >= sign * goal] for curve in curves]
                firsts = [backward[0] for backward in reached if backward]
                goals[metric, goal] = GoalCost(estimated(firsts), len(firsts), len(curves))
        curves = [curve for run in runs if (curve := run.backward_curve(HELD_OUT))]
        mean_curve = np.empty((0, 2))  # [epochs, 2]
        if curves:
            shortest = min(map(len, curves))
            mean_curve = np.mean([curve[:shortest] for curve in curves], 0)
        return Line(
            row=row,
            seeds=tuple(values),
            value=estimated(values.values()),
            difference=None if row == table.baseline else paired_difference(values, baseline, compared),
            verdict=self._verdict(case, row),
            costs={name: cost for name, cost in costs.items() if cost},
            goals=goals,
            columns=columns,
            curve=[(float(backward), float(value)) for backward, value in mean_curve],
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

        def points_of(label: str) -> dict[int, Point]:
            """Return total work and metric by done seed."""
            points = {}
            for seed, value in self._values(case, label).items():
                if summary := self.done[case, label, seed].summary:
                    points[seed] = (bill(summary)["work"], value)
            return points

        curves: dict[int, list[Point]] = {seed: [] for seed in table.seeds}
        for label in baselines:
            for seed, point in points_of(label).items():
                curves[seed].append(point)
        verdicts = len(table.cases) * (len(table.rows) - len(baselines))
        return judge(points_of(row), curves, mode=METRICS[table.metric].mode, verdicts=verdicts)

    def _values(self, case: str, row: str) -> dict[int, float]:
        """Return the metric by done seed."""
        runs = {seed: self.done[case, row, seed] for seed in self.table.seeds if (case, row, seed) in self.done}
        values = {seed: run.figures().get(self.table.metric) for seed, run in runs.items()}
        return {seed: float(value) for seed, value in values.items() if value is not None}

    def _figure(self, name: str, case: str, row: str, seed: int) -> float | None:
        run = self.done.get((case, row, seed))
        over, slash, key = name.rpartition(" / ")
        reference = self.done.get((case, over or self.table.reference or self.table.baseline, seed))
        if slash and run and reference and run.summary and reference.summary:
            return bill(reference.summary)[key] / bill(run.summary)[key]
        return column_figure(name, run, reference) if run else None


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


# Figures


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


def estimated(values: Iterable[float]) -> Estimate | None:
    """Return mean and standard deviation with n − 1, or None without any value.

    >>> estimated([1.0, 2.0, 3.0])
    Estimate(mean=2.0, spread=1.0)
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
) -> Estimate | None:
    """Return the mean difference from the baseline over the seeds of both, with half the width of its interval.

    >>> paired_difference({0: 2.0, 1: 4.0, 2: 9.0}, {0: 1.0, 1: 2.0}).mean
    1.5
    """
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if not differences:
        return None
    half = half_interval(differences, comparisons) if len(differences) > 1 else math.nan
    return Estimate(fmean(differences), half)

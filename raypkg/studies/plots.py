"""The plots of a study: effects of settings, learning curves, rows over seeds, and accuracy against its cost."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raypkg.runs.plots import BLUE, GREY, ORANGE, VERMILLION, count_axis, cut, headline, name_points, note, page

from .outcomes import Case, Line
from .study import DONE, Row

Results = Sequence[Row]
Curve = Sequence[tuple[float, float]]
Png = str | Path
COLUMNS = 3  # panels side by side
LABEL = 28  # characters of a row's name
TITLE = 30  # characters of a case's name
WIDE = 8  # largest over smallest value above which an axis is logarithmic


def is_share(metric: str) -> bool:
    """Return True if a metric is shown in per cent."""
    return metric.endswith("accuracy")


# Sweeps


def against_settings(results: Results, names: Sequence[str], metric: str, path: Png) -> None:
    """Draw the metric against each setting, a point for each trial; those that are not done are hollow."""
    rows = [row for row in results if row.get(metric) is not None]
    values = [row[metric] for row in rows]
    colours = [BLUE if row["state"] == DONE else "none" for row in rows]
    across = max(1, min(COLUMNS, len(names)))
    down = max(1, math.ceil(len(names) / across))
    with page(path) as figure:
        panels = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
        for axes, name in zip(panels, names, strict=False):
            column = [row.get(name) for row in rows]
            if all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
                positions, ticks = np.array(column, dtype=float), np.array([])
            else:  # other values stand in the order of their names
                ticks, positions = np.unique([str(value) for value in column], return_inverse=True)
            axes.scatter(positions, values, s=40, facecolors=colours, edgecolors=BLUE)
            axes.set_title(name)
            axes.margins(0.1)
            if len(ticks):
                axes.set_xticks(range(len(ticks)), ticks)
            elif len(rows) and positions.min() > 0 and positions.max() / positions.min() > WIDE:
                axes.set_xscale("log")
                shown = np.geomspace(positions.min(), positions.max(), 3)
                axes.set_xticks(shown, [f"{value:.2g}" for value in shown])
                axes.xaxis.set_minor_formatter("")
        for axes in panels[len(names) :]:
            axes.axis("off")
        figure.supylabel(metric, color=GREY)
        headline(figure, f"{metric} of {len(rows)} trials (hollow: not done)")


def learning_curves(curves: Mapping[str, Curve], metric: str, best: str | None, path: Png) -> None:
    """Draw the metric of every trial, by its name, against epochs; the best trial stands out."""
    last_epochs = [curve[-1][0] for curve in curves.values() if curve]
    longest = max(last_epochs, default=0)
    complete = last_epochs.count(longest)
    with page(path) as figure:
        axes = figure.subplots()
        for name, curve in curves.items():
            if not curve:
                continue
            look: dict[str, Any] = {"color": BLUE, "alpha": 0.5, "zorder": 2}
            if name == best:
                look = {"color": VERMILLION, "zorder": 3}
                note(axes, name, curve[-1], (-4, 8), ha="right", color=VERMILLION, weight="bold")
            axes.plot(*_transposed(curve), marker="o", markevery=[-1], markersize=4, **look)
        axes.set_title(f"{complete} of {len(last_epochs)} trials reached epoch {longest:.0f}")
        axes.set(xlabel="epoch", ylabel=metric)
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)


def pareto(points: Mapping[int, tuple[float, float]], front: Sequence[int], metric: str, path: Png) -> None:
    """Draw samples back-propagated and metric of the done trials, by number, and those on the Pareto front."""
    with page(path) as figure:
        axes = figure.subplots()
        axes.scatter(*_transposed(list(points.values())), color=BLUE)
        costs, values = _transposed([points[trial] for trial in front])
        axes.step(costs, values, where="post", color=ORANGE)
        axes.plot(costs, values, "o", color=VERMILLION, markersize=8, zorder=3)
        for trial in front:
            note(axes, str(trial), points[trial], (6, 6), color=VERMILLION, weight="bold")
        trials = "trial" if len(points) == 1 else "trials"
        are = "is" if len(front) == 1 else "are"
        axes.set_title(f"{len(front)} of {len(points)} {trials} {are} on the Pareto front")
        axes.set_ylabel(metric)
        axes.set_xlabel("samples back-propagated")
        count_axis(axes.xaxis)
        axes.margins(0.1)


# Comparisons


def rows_of_case(case: Case, metric: str, path: Png) -> None:
    """Draw the rows of a case: mean ± standard deviation of the metric against work, and the Pareto front."""
    scale, unit = (100, ", %") if is_share(metric) else (1, "")
    name = metric.replace("_", " ")
    with page(path) as figure:
        axes = figure.subplots()
        ends, on_front = [], []
        for line in case.lines:
            if line.value is None:
                continue
            colour = _colour(line)
            point = (line.costs["work"].mean, scale * line.value.mean)
            deviation = np.nan_to_num(scale * line.value.spread)
            axes.errorbar(*point, yerr=deviation, fmt="o", color=colour, capsize=3)
            ends.append((*point, cut(line.row, LABEL), colour))
            on_front += [point] if line.on_front else []
        axes.plot(*_transposed(sorted(on_front)), color=VERMILLION, linewidth=1)
        axes.set_title(f"{cut(case.label, TITLE)}: {name}, mean ± standard deviation; line: Pareto front")
        axes.set(xlabel="work, samples trained on", ylabel=name + unit, xscale="log")
        count_axis(axes.xaxis)
        name_points(axes, ends)


def curves_of_case(case: Case, path: Png) -> None:
    """Draw the mean held-out accuracy of each row against samples back-propagated; rows without a curve are omitted."""
    with page(path) as figure:
        axes = figure.subplots()
        ends = []
        for line in case.lines:
            if len(line.curve) <= 1:
                continue
            spent, values = _transposed(line.curve)
            axes.plot(spent, 100 * values, color=_colour(line), linewidth=2 if line.on_front else 1)
            ends.append((spent[-1], 100 * values[-1], cut(line.row, LABEL), _colour(line)))
        axes.set_title(f"{cut(case.label, TITLE)}: held-out accuracy, mean over seeds; red: Pareto front")
        axes.set(xlabel="samples back-propagated", ylabel="held-out accuracy, %", xscale="log")
        count_axis(axes.xaxis)
        name_points(axes, ends)


# Parts


def _colour(line: Line) -> str:
    """Return the colour of a row: those on the Pareto front stand out."""
    return VERMILLION if line.on_front else BLUE


def _transposed(points: Curve) -> np.ndarray:
    """Return the coordinates of points, [2, n]."""
    return np.array(points, dtype=float).reshape(-1, 2).T

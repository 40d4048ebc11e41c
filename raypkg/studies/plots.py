"""The pictures of a sweep: what each setting does, all trials at once, and what accuracy costs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raypkg.runs.plots import BLUE, GREY, NOTE, ORANGE, VERMILLION, page, short

if TYPE_CHECKING:
    from raypkg.runs.plots import Axes

Row = Mapping[str, Any]  # of a trial
Results = Sequence[Row]
Curve = Sequence[tuple[int, float]]  # epoch and metric
Png = str | Path
COLUMNS = 3  # panels side by side
SMALL: dict[str, Any] = {"color": GREY, "size": 8, **NOTE}
EMPHASIS: dict[str, Any] = {"color": VERMILLION, "weight": "bold", **NOTE}
WIDE = 8  # largest over smallest value, above which an axis is logarithmic


def against_settings(results: Results, names: Sequence[str], metric: str, path: Png) -> None:
    """Draw the metric against each setting, a point for each trial; those that are not done are hollow.

    Args:
        results: a row for each trial, with ``state``, the metric and the settings.
        names: of the settings that vary.
        metric: its column.
        path: the PNG to write.
    """
    rows = _measured(results, metric)
    values = [row[metric] for row in rows]
    colours = [BLUE if row["state"] == "done" else "none" for row in rows]
    across = max(1, min(COLUMNS, len(names)))
    down = max(1, math.ceil(len(names) / across))
    with page(path) as figure:
        grid = figure.subplots(down, across, squeeze=False, sharey=True)
        panels = list(grid.flat)
        for axes, name in zip(panels, names, strict=False):
            positions, ticks = _positions([row.get(name) for row in rows])
            axes.scatter(positions, values, s=40, facecolors=colours, edgecolors=BLUE)
            axes.set_title(name)
            _label_axis(axes, positions, ticks)
        for axes in panels[len(names) :]:
            axes.axis("off")
        figure.supylabel(metric, color=GREY)
        title = f"{metric} of {len(rows)} trials (hollow: not done)"
        figure.suptitle(title, x=0.02, ha="left")


def parallel(
    results: Results,
    names: Sequence[str],
    metric: str,
    mode: str,
    path: Png,
) -> None:
    """Draw every trial as a line through its settings to its metric; the best quarter stands out.

    Args:
        results: a row for each trial.
        names: of the settings that vary.
        metric: its column, the last axis.
        mode: max or min.
        path: the PNG to write.
    """
    rows = _measured(results, metric)
    best = _best_quarter([row[metric] for row in rows], mode)
    columns = [*names, metric]
    with page(path) as figure:
        axes = figure.subplots()
        axes.set_xticks(range(len(columns)), columns, rotation=20, ha="right")
        axes.set_yticks([])
        axes.grid(axis="y", visible=False)
        heights = []
        for place, name in enumerate(columns):
            values = [row.get(name) for row in rows]
            heights.append(_draw_column(axes, place, values))
        for trial, line in enumerate(zip(*heights, strict=True)):
            if trial in best:
                axes.plot(line, color=VERMILLION, linewidth=2.2, alpha=0.9)
            else:
                axes.plot(line, color=BLUE, linewidth=1, alpha=0.4)
        title = f"{len(best)} best of {len(rows)} trials by {metric}, and the others"
        axes.set_title(title)


def learning_curves(
    curves: Mapping[str, Curve],
    metric: str,
    best: str | None,
    path: Png,
) -> None:
    """Draw the metric of every trial against epochs; the best one stands out.

    Args:
        curves: epoch and metric of each trial, by its name.
        metric: its name.
        best: the trial that stands out, if one is done.
        path: the PNG to write.
    """
    measured = {name: curve for name, curve in curves.items() if curve}
    lines = {name: np.array(curve, dtype=float) for name, curve in measured.items()}  # [epochs, 2] each
    ends = [line[-1] for line in lines.values()]
    longest = max((epoch for epoch, _ in ends), default=0)
    complete = sum(epoch == longest for epoch, _ in ends)
    with page(path) as figure:
        axes = figure.subplots()
        for name, line in lines.items():
            _draw_curve(axes, line, stands_out=name == best)
        if best in lines:
            end = lines[best][-1]
            axes.annotate(best, end, (-4, 8), ha="right", **EMPHASIS)
        title = f"{complete} of {len(lines)} trials reached epoch {longest:.0f}"
        axes.set(title=title, xlabel="epoch", ylabel=metric)
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)


def pareto(results: Results, front: Sequence[int], metric: str, path: Png) -> None:
    """Draw the metric against the samples back-propagated, and the trials that no other beats in both.

    Args:
        results: a row for each trial.
        front: numbers of those trials, the cheapest first.
        metric: its column.
        path: the PNG to write.
    """
    rows = [row for row in _measured(results, metric) if _is_comparable(row)]
    points = {row["trial"]: (row["backward"], row[metric]) for row in rows}
    with page(path) as figure:
        axes = figure.subplots()
        axes.scatter([row["backward"] for row in rows], [row[metric] for row in rows], color=BLUE)
        if front:
            costs, values = zip(*(points[trial] for trial in front), strict=True)
            axes.step(costs, values, where="post", color=ORANGE)
            axes.plot(costs, values, "o", color=VERMILLION, markersize=8, zorder=3)
        for trial in front:
            axes.annotate(str(trial), points[trial], (6, 6), **EMPHASIS)
        trials = "trial" if len(points) == 1 else "trials"
        are = "is" if len(front) == 1 else "are"
        axes.set_title(f"{len(front)} of {len(points)} {trials} {are} on the Pareto front")
        axes.set_ylabel(metric)
        axes.set_xlabel("samples back-propagated")
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.margins(0.1)


def _measured(results: Results, metric: str) -> Results:
    return [row for row in results if row.get(metric) is not None]


def _is_comparable(row: Row) -> bool:
    """Say whether a trial's cost is that of a whole training on all samples."""
    return row["state"] == "done" and row.get("backward") is not None


def _best_quarter(values: Sequence[float], mode: str) -> set[int]:
    """Return the places of the best values, at least one."""
    order = np.argsort(values)
    if mode == "max":
        order = np.argsort(-np.array(values))
    count = max(1, len(order) // 4)
    return set(order[:count].tolist())


def _draw_curve(axes: "Axes", line: np.ndarray, stands_out: bool) -> None:
    """Draw a learning curve, [epochs, 2], with a dot at its end."""
    colour = VERMILLION if stands_out else BLUE
    alpha = 1 if stands_out else 0.5
    layer = 3 if stands_out else 2
    epochs, values = line.T
    axes.plot(epochs, values, color=colour, alpha=alpha, zorder=layer)
    axes.plot(epochs[-1], values[-1], "o", color=colour, markersize=4, zorder=layer)


def _positions(values: Sequence[Any]) -> tuple[np.ndarray, list[str]]:
    """Return where values lie on an axis: numbers where they are, others one after another, with their names."""
    if all(_is_number(value) for value in values):
        return np.array(values, dtype=float), []
    names = sorted({str(value) for value in values})
    places = [names.index(str(value)) for value in values]
    return np.array(places, dtype=float), names


def _draw_column(axes: "Axes", place: int, values: Sequence[Any]) -> np.ndarray:
    """Label one of the parallel axes, and return the height of each value on it, in [0, 1]."""
    positions, ticks = _positions(values)
    if not ticks and _logarithmic(positions):
        positions = np.log10(positions)
    heights = _stretched(positions)
    labels = dict(zip(heights.tolist(), values, strict=True))  # one for each height
    for height, value in labels.items():
        if ticks or height in (0.0, 1.0):  # of a range, the ends
            axes.annotate(_label(value), (place, height), (4, 2), **SMALL)
    return heights


def _label_axis(axes: "Axes", positions: np.ndarray, ticks: list[str]) -> None:
    axes.margins(0.1)
    if ticks:
        axes.set_xticks(range(len(ticks)), ticks)
    elif _logarithmic(positions):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter("")


def _logarithmic(positions: np.ndarray) -> bool:
    if not len(positions) or positions.min() <= 0:
        return False
    return positions.max() / positions.min() > WIDE


def _stretched(positions: np.ndarray) -> np.ndarray:
    """Return positions from 0 to 1; where all are the same, in the middle."""
    if not len(positions) or positions.max() == positions.min():
        return np.full(len(positions), 0.5)
    low = positions.min()
    high = positions.max()
    return (positions - low) / (high - low)


def _label(value: Any) -> str:
    return f"{value:.3g}" if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

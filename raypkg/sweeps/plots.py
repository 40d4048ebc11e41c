"""The pictures of a sweep: what each setting does, all trials at once, and what accuracy costs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raypkg.runs.plots import BLUE, GREY, NOTE, ORANGE, VERMILLION, page, short

Results = Sequence[Mapping[str, Any]]
COLUMNS = 3  # panels side by side


def against_settings(results: Results, names: Sequence[str], metric: str, path: str | Path) -> None:
    """Draw the metric against each setting, a point for each trial; those that are not done are hollow.

    Args:
        results: a row for each trial, with ``state``, the metric and the settings.
        names: of the settings that vary.
        metric: its column.
        path: the PNG to write.
    """
    shown = [row for row in results if row.get(metric) is not None]
    done = [row["state"] == "done" for row in shown]
    values = np.array([row[metric] for row in shown], dtype=float)
    with page(path) as figure:
        columns = max(1, min(COLUMNS, len(names)))
        panels = list(
            figure.subplots(max(1, math.ceil(len(names) / columns)), columns, squeeze=False, sharey=True).flat
        )
        for axes, name in zip(panels, names, strict=False):
            where, ticks = _places([row.get(name) for row in shown])
            colours = [BLUE if finished else "none" for finished in done]
            axes.scatter(where, values, s=40, facecolors=colours, edgecolors=BLUE)
            axes.set(title=name, xlabel="")
            _mark(axes, where, ticks)
        for axes in panels[len(names) :]:
            axes.axis("off")
        figure.supylabel(metric, color=GREY)
        figure.suptitle(f"{metric} of {len(shown)} trials (hollow: not done)", x=0.02, ha="left")


def parallel(results: Results, names: Sequence[str], metric: str, mode: str, path: str | Path) -> None:
    """Draw every trial as a line through its settings to its metric; the best quarter stands out.

    Args:
        results: a row for each trial.
        names: of the settings that vary.
        metric: its column, the last axis.
        mode: max or min.
        path: the PNG to write.
    """
    shown = [row for row in results if row.get(metric) is not None]
    with page(path) as figure:
        axes = figure.subplots()
        axes.set_xticks(range(len(names) + 1), [*names, metric], rotation=20, ha="right")
        axes.set_yticks([])
        axes.grid(axis="y", visible=False)
        heights = []
        for column, name in enumerate([*names, metric]):
            where, ticks = _places([row.get(name) for row in shown])
            heights.append(_unit(np.log10(where) if _logarithmic(where) and not ticks else where))
            for height, value in dict(zip(heights[-1].tolist(), [row.get(name) for row in shown], strict=True)).items():
                if ticks or height in (0.0, 1.0):
                    axes.annotate(_label(value), (column, height), (4, 2), color=GREY, size=8, **NOTE)
        order = np.argsort([row[metric] * (-1 if mode == "max" else 1) for row in shown])
        best = set(order[: max(1, len(order) // 4)].tolist())
        for trial in range(len(shown)):
            colour, width = (VERMILLION, 2.2) if trial in best else (BLUE, 1)
            axes.plot([h[trial] for h in heights], color=colour, linewidth=width, alpha=0.9 if trial in best else 0.4)
        axes.set_title(f"{len(best)} best of {len(shown)} trials by {metric}, and the others")


def learning_curves(
    curves: Mapping[str, Sequence[tuple[int, float]]], metric: str, best: str | None, path: str | Path
) -> None:
    """Draw the metric of every trial against epochs; the best one stands out.

    Args:
        curves: epoch and metric of each trial, by its name.
        metric: its name.
        best: the trial that stands out, if one is done.
        path: the PNG to write.
    """
    drawn = {name: np.array(points, dtype=float) for name, points in curves.items() if points}
    longest = max((points[-1, 0] for points in drawn.values()), default=0)
    with page(path) as figure:
        axes = figure.subplots()
        for name, points in drawn.items():
            chosen = name == best
            axes.plot(*points.T, color=VERMILLION if chosen else BLUE, alpha=1 if chosen else 0.5, zorder=2 + chosen)
            axes.plot(*points[-1], color=VERMILLION if chosen else BLUE, marker="o", markersize=4, zorder=2 + chosen)
        if best in drawn:
            axes.annotate(best, drawn[best][-1], (-4, 8), ha="right", color=VERMILLION, weight="bold", **NOTE)
        whole = sum(points[-1, 0] == longest for points in drawn.values())
        axes.set(title=f"{whole} of {len(drawn)} trials reached epoch {longest:.0f}", xlabel="epoch", ylabel=metric)
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)


def pareto(results: Results, front: Sequence[int], metric: str, path: str | Path) -> None:
    """Draw the metric against the samples back-propagated, and the trials that no other beats in both.

    Args:
        results: a row for each trial.
        front: numbers of those trials, the cheapest first.
        metric: its column.
        path: the PNG to write.
    """
    done = {
        row["trial"]: (row["backward"], row[metric])
        for row in results
        if row["state"] == "done" and not row.get("proxy") and None not in (row.get(metric), row.get("backward"))
    }
    with page(path) as figure:
        axes = figure.subplots()
        if done:
            axes.plot(*np.array(list(done.values()), dtype=float).T, "o", color=BLUE)
        if front:
            line = np.array([done[trial] for trial in front], dtype=float)
            axes.step(*line.T, where="post", color=ORANGE)
            axes.plot(*line.T, "o", color=VERMILLION, markersize=8, zorder=3)
            for trial, point in zip(front, line, strict=True):
                axes.annotate(str(trial), point, (6, 6), color=VERMILLION, weight="bold", **NOTE)
        axes.set(title=f"{len(front)} of {len(done)} trials are on the Pareto front", ylabel=metric)
        axes.set_xlabel("samples back-propagated")
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.margins(0.1)


def _places(values: Sequence[Any]) -> tuple[np.ndarray, list[str]]:
    """Return where values lie on an axis: numbers where they are, choices between others one after another."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return np.array(values, dtype=float), []
    names = sorted({str(value) for value in values})
    return np.array([names.index(str(value)) for value in values], dtype=float), names


def _logarithmic(where: np.ndarray) -> bool:
    return len(where) > 0 and where.min() > 0 and where.max() / where.min() > 8


def _mark(axes: Any, where: np.ndarray, ticks: list[str]) -> None:
    axes.margins(0.1)
    if ticks:
        axes.set_xticks(range(len(ticks)), ticks)
    elif _logarithmic(where):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter("")


def _unit(where: np.ndarray) -> np.ndarray:
    low, high = (where.min(), where.max()) if len(where) else (0, 0)
    return (where - low) / (high - low) if high > low else np.full(len(where), 0.5)


def _label(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)

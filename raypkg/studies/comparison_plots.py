"""The pictures of a comparison: each row's mean over seeds, what it cost, and how it learned."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypkg.runs.plots import BLUE, GREY, ORANGE, VERMILLION, page
from raypkg.runs.style import NOTE, cut, short

from .outcomes import Case, Line

if TYPE_CHECKING:
    from raypkg.runs.plots import Axes

LABEL = 28  # characters of a row's name


def rows_of_case(case: Case, metric: str, path: str | Path) -> None:
    """Draw the rows of a case: mean ± standard deviation, the metric against work, and the best rows' curves.

    Args:
        case: rows that are done have a value.
        metric: its name.
        path: the PNG to write.
    """
    lines = [line for line in case.lines if line.value]
    scale = 100 if metric.endswith("accuracy") else 1
    name = metric.replace("_", " ") + (", %" if scale == 100 else "")
    with page(path) as figure:
        figure.suptitle(f"{case.label}: {len(lines)} rows", x=0.02, ha="left")
        left, right = figure.subplots(1, 2, width_ratios=(3, 4))
        _means(left, lines, name, scale)
        _work(right, lines, name, scale)


def curves_of_case(case: Case, baseline: str, path: str | Path) -> None:
    """Draw the mean held-out accuracy of each row against samples back-propagated.

    Args:
        case: rows without a curve are left out.
        baseline: the row that stands out in grey; those on the front are named.
        path: the PNG to write.
    """
    lines = [line for line in case.lines if len(line.curve) > 1]
    with page(path) as figure:
        axes = figure.subplots()
        for line in lines:
            is_baseline = line.row == baseline
            colour = GREY if is_baseline else _colour(line)
            spent, values = zip(*line.curve, strict=True)
            percent = [100 * value for value in values]
            if not (is_baseline or line.on_front):
                axes.plot(spent, percent, color=colour, linewidth=1, alpha=0.5)
                continue
            axes.plot(spent, percent, color=colour, linewidth=2)
            end = (spent[-1], percent[-1])
            axes.annotate(cut(line.row, LABEL), end, (4, 0), color=colour, size=8, **NOTE)
        axes.set(
            title=f"{case.label}: held-out accuracy, mean over seeds",
            xlabel="samples back-propagated",
            ylabel="held-out accuracy, %",
        )
        axes.margins(x=0.15)
        axes.xaxis.set_major_formatter(lambda value, _: short(value))


def _means(axes: "Axes", lines: Sequence[Line], name: str, scale: int) -> None:
    """Draw mean ± standard deviation of each row, the first on top; rows on the front stand out."""
    places = range(len(lines))
    for place, line in zip(places, lines, strict=True):
        assert line.value
        mean = scale * line.value.mean
        deviation = 0.0 if math.isnan(line.value.std) else scale * line.value.std
        axes.errorbar(mean, place, xerr=deviation, fmt="o", color=_colour(line), capsize=3)
    axes.set_yticks(list(places), [cut(line.row, LABEL) for line in lines])
    axes.set_ylim(max(len(lines), 4) - 0.5, -0.5)
    axes.set(title="mean ± standard deviation", xlabel=name)
    axes.locator_params(axis="x", nbins=5)


def _work(axes: "Axes", lines: Sequence[Line], name: str, scale: int) -> None:
    """Draw the metric against work; those on the front are joined and named, the others' names are in the table."""
    on_front = []
    for line in lines:
        assert line.value
        point = (line.costs["work"].mean, scale * line.value.mean)
        axes.scatter(*point, s=40, color=_colour(line))
        if line.on_front:
            on_front.append(point)
            axes.annotate(cut(line.row, LABEL), point, (4, 8), color=GREY, size=8, **NOTE)
    front = np.array(sorted(on_front)).reshape(-1, 2)
    axes.plot(front[:, 0], front[:, 1], color=ORANGE, linewidth=1)
    axes.set(title="against work (named: the Pareto front)", xlabel="work, samples trained on", ylabel=name)
    axes.margins(x=0.25, y=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.locator_params(axis="x", nbins=5)


def _colour(line: Line) -> str:
    """Return the colour of a row: those on the Pareto front stand out."""
    return VERMILLION if line.on_front else BLUE

"""The picture of sparse training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypkg.runs.plots import BLUE, GREY, ORANGE, Rows, column, cut, line_ends, page, short

if TYPE_CHECKING:
    from raypkg.runs.plots import Axes


def topology(changes: Rows, path: str | Path) -> None:
    """Draw how dense each layer is, and how many of all weights ever were active.

    Args:
        changes: dicts with ``epoch``, ``layer``, ``active``, ``weights`` and ``explored_share``, by time.
        path: the PNG to write.
    """
    layers = list(dict.fromkeys(row["layer"] for row in changes))
    with page(path) as figure:
        density, explored = figure.subplots(1, 2, width_ratios=(2, 1))
        _draw_densities(density, changes, layers)
        _draw_explored(explored, changes, len(layers))


def _draw_densities(axes: Axes, changes: Rows, layers: list[str]) -> None:
    """Draw each layer's first and last density, a line each."""
    lines = np.arange(len(layers))
    first = changes[: len(layers)]
    last = changes[-len(layers) :]
    axes.plot(
        _densities(first),
        lines,
        "o",
        linestyle="none",
        label="at first",
        markeredgecolor=GREY,
        markerfacecolor="none",
        markersize=10,
    )
    axes.plot(_densities(last), lines, "o", linestyle="none", label="at last", color=BLUE)
    active = sum(row["active"] for row in last)
    weights = sum(row["weights"] for row in last)
    title = f"{active / weights:.2%} of {short(weights)} weights exist"
    axes.set(title=title, xlabel="density, %")
    axes.set_xlim(left=0)
    names = [cut(name.removesuffix(".weight"), 30) for name in layers]
    axes.set_yticks(lines, names, fontsize=7)
    axes.invert_yaxis()
    axes.legend(loc="center right", frameon=False)  # where layers are sparse


def _draw_explored(axes: Axes, changes: Rows, layers: int) -> None:
    """Draw the shares of the weights that exist and that ever did, over time."""
    once = changes[::layers]  # a row for each change: these figures are the same in all layers
    epoch = column(once, "epoch")
    explored = 100 * column(once, "explored_share")
    active = column(changes, "active").reshape(-1, layers)  # [changes, layers]
    weights = column(changes, "weights").reshape(-1, layers)
    density = 100 * active.sum(1) / weights.sum(1)
    axes.step(epoch, explored, where="post", color=BLUE)
    axes.step(epoch, density, where="post", color=ORANGE)
    ends = {
        "ever existed, R_s": (explored[-1], BLUE),
        "exist": (density[-1], ORANGE),
    }
    line_ends(axes, epoch[-1], ends)
    axes.set(
        title=f"{explored[-1] / 100:.1%} ever existed",
        xlabel="epoch",
        ylim=(0, 105),
        ylabel="% of the weights",
    )


def _densities(rows: Rows) -> np.ndarray:
    return 100 * column(rows, "active") / column(rows, "weights")

"""The plot of sparse training."""

from pathlib import Path

import numpy as np

from raypkg.runs.plots import BLUE, GREY, ORANGE, Rows, column, cut, line_ends, page, short


def topology(changes: Rows, path: str | Path) -> None:
    """Draw each layer's first and last density, and the shares of active and of ever active weights over time.

    The rows are those of `Topology.history`, one per change and layer.
    """
    layers = list(dict.fromkeys(row["layer"] for row in changes))
    names = [cut(layer.removesuffix(".weight"), 30) for layer in layers]
    lines = np.arange(len(layers))
    of_all = changes[:: len(layers)]  # one row per change
    epoch = column(of_all, "epoch")
    explored = 100 * column(of_all, "explored_share")
    active, weights = (column(changes, key).reshape(-1, len(layers)) for key in ("active", "weights"))
    of_layers = 100 * active / weights  # [changes, layers]
    density = 100 * active.sum(1) / weights.sum(1)  # [changes]
    total = short(weights[-1].sum())
    with page(path) as figure:
        axes, over_time = figure.subplots(1, 2, width_ratios=(2, 1))
        hollow = {"markeredgecolor": GREY, "markerfacecolor": "none", "markersize": 10}
        axes.plot(of_layers[0], lines, "o", label="at first", **hollow)
        axes.plot(of_layers[-1], lines, "o", label="at last", color=BLUE)
        axes.set(title=f"{density[-1] / 100:.2%} of {total} weights exist", xlabel="density, %", xlim=(0, None))
        axes.set_yticks(lines, names, fontsize=7)
        axes.invert_yaxis()
        axes.legend(loc="center right")  # where layers are sparse

        over_time.step(epoch, explored, where="post", color=BLUE)
        over_time.step(epoch, density, where="post", color=ORANGE)
        line_ends(over_time, epoch[-1], {"ever existed, R_s": (explored[-1], BLUE), "exist": (density[-1], ORANGE)})
        title = f"{explored[-1] / 100:.1%} ever existed"
        over_time.set(title=title, xlabel="epoch", ylim=(0, 105), ylabel="% of the weights")

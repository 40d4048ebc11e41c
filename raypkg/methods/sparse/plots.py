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
    active = column(changes, "active").reshape(-1, len(layers))  # [changes, layers]
    weights = column(changes, "weights").reshape(-1, len(layers))
    of_layers = 100 * active / weights
    density = 100 * active.sum(axis=1) / weights.sum(axis=1)  # [changes]
    total = short(weights[-1].sum())

    changes_of_all = changes[:: len(layers)]  # one row per change
    epoch = column(changes_of_all, "epoch")
    explored = 100 * column(changes_of_all, "explored_share")
    with page(path) as figure:
        by_layer, over_time = figure.subplots(1, 2, width_ratios=(2, 1))

        lines = np.arange(len(layers))
        by_layer.plot(of_layers[0], lines, "o", label="at first", color=GREY, fillstyle="none", markersize=10)
        by_layer.plot(of_layers[-1], lines, "o", label="at last", color=BLUE)
        by_layer.set(title=f"{density[-1] / 100:.2%} of {total} weights exist", xlabel="density, %", xlim=(0, None))
        by_layer.set_yticks(lines, names, fontsize=7)
        by_layer.invert_yaxis()
        by_layer.legend(loc="center right")  # where layers are sparse

        ends = {"ever existed, R_s": (explored[-1], BLUE), "exist": (density[-1], ORANGE)}
        over_time.step(epoch, explored, where="post", color=BLUE)
        over_time.step(epoch, density, where="post", color=ORANGE)
        line_ends(over_time, epoch[-1], ends)
        over_time.set_title(f"{explored[-1] / 100:.1%} ever existed")
        over_time.set(xlabel="epoch", ylabel="% of the weights", ylim=(0, 105))

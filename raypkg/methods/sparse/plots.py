"""The picture of sparse training."""

from pathlib import Path

import numpy as np

from raypkg.runs.plots import BLUE, GREY, ORANGE, Rows, column, cut, line_ends, page, short


def topology(changes: Rows, path: str | Path) -> None:
    """Draw how dense each layer is, and how many of all weights ever were active.

    Args:
        changes: dicts with ``epoch``, ``layer``, ``active``, ``weights`` and ``explored_share``, by time.
        path: the PNG to write.
    """
    layers = list(dict.fromkeys(row["layer"] for row in changes))
    with page(path) as figure:
        density, explored = figure.subplots(1, 2, width_ratios=(2, 1))
        rows = np.arange(len(layers))
        first, last = changes[: len(layers)], changes[-len(layers) :]
        for part, look, name in (
            (first, {"mec": GREY, "mfc": "none", "ms": 10}, "at first"),
            (last, {"c": BLUE}, "at last"),
        ):
            shares = 100 * column(part, "active") / column(part, "weights")
            density.plot(shares, rows, "o", linestyle="none", label=name, **look)
        active, weights = (sum(row[key] for row in last) for key in ("active", "weights"))
        density.set(title=f"{active / weights:.2%} of {short(weights)} weights exist", xlabel="density, %")
        density.set_xlim(left=0)
        density.set_yticks(rows, [cut(name.removesuffix(".weight"), 30) for name in layers], fontsize=7)
        density.invert_yaxis()
        density.legend(frameon=False)
        epoch, share = (column(changes[:: len(layers)], key) for key in ("epoch", "explored_share"))
        exist, whole = (column(changes, key).reshape(-1, len(layers)).sum(1) for key in ("active", "weights"))
        for values, colour in ((100 * share, BLUE), (100 * exist / whole, ORANGE)):
            explored.step(epoch, values, where="post", color=colour)
        ends = {"ever existed, R_s": (100 * share[-1], BLUE), "exist": (100 * exist[-1] / whole[-1], ORANGE)}
        line_ends(explored, epoch[-1], ends)
        explored.set(title=f"{share[-1]:.1%} ever existed", xlabel="epoch", ylim=(0, 105), ylabel="% of the weights")

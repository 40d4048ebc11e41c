"""The plot of sparse training."""

from pathlib import Path

from raypkg.runs.plots import BLUE, GREY, ORANGE, Rows, column, cut, line_ends, page, short


def topology(changes: Rows, path: str | Path) -> None:
    """Draw each layer's first and last density, and the shares of active and of ever active weights over time.

    The rows are those of `Topology.history`, one per change and layer.
    """
    layers = list(dict.fromkeys(row["layer"] for row in changes))
    names = [cut(layer.removesuffix(".weight"), 30) for layer in layers]
    weights = column(changes[: len(layers)], "weights")  # [layers]
    active = column(changes, "active").reshape(-1, len(layers))  # [changes, layers]
    of_layers = 100 * active / weights
    density = 100 * active.sum(axis=1) / weights.sum()  # [changes]
    by_change = changes[:: len(layers)]
    epoch = column(by_change, "epoch")
    explored = 100 * column(by_change, "explored_share")

    with page(path) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))

        lines = range(len(layers))
        left.plot(of_layers[0], lines, "o", label="at first", color=GREY, fillstyle="none", markersize=10)
        left.plot(of_layers[-1], lines, "o", label="at last", color=BLUE)
        left.set_title(f"{density[-1] / 100:.2%} of {short(weights.sum())} weights exist")
        left.set_xlabel("density, %")
        left.set_xlim(left=0)
        left.set_yticks(lines, names, fontsize=min(10, 240 / len(names)))
        left.set_ylim(max(len(names), 6) - 0.5, -0.5)
        left.legend(loc="lower right")

        right.step(epoch, explored, where="post", color=BLUE)
        right.step(epoch, density, where="post", color=ORANGE)
        line_ends(right, epoch[-1], {"ever existed, R_s": (explored[-1], BLUE), "exist": (density[-1], ORANGE)})
        right.set_title(f"{explored[-1] / 100:.1%} ever existed")
        right.set_xlabel("epoch")
        right.set_ylabel("% of the weights")
        right.set_ylim(0, 105)

"""The plot of AGENT."""

from pathlib import Path

import numpy as np

from raypkg.runs.plots import BLUE, GREY, VERMILLION, Rows, column, page

HIGHEST = 1.5  # share of the variance at the top of the plot: a correction may add to it


def correction(steps: Rows, path: str | Path) -> None:
    """Plot AGENT's weight c and the variance left, against that of a batch of the same cost, to a PNG.

    ``steps`` are dicts with ``step``, ``corrected`` (0 = looked at), ``c``, ``left`` (NaN = unknown) and ``line``, 1/q.
    """
    step = column(steps, "step")
    c = column(steps, "c")
    left = column(steps, "left")
    line = column(steps, "line")
    corrected = column(steps, "corrected") == 1
    known = np.isfinite(left)
    groups = {"corrected": (known & corrected, BLUE), "looked at": (known & ~corrected, GREY)}
    last_c = f"{c[-1]:.3g}" if len(c) else "–"
    median = f"{np.median(left[known]):.2g}" if known.any() else "–"
    title = f"Share of the gradients' variance that is left: {median} (median)"
    dashed = {"color": VERMILLION, "linestyle": "--", "linewidth": 1}
    with page(path) as figure:
        weight, variance = figure.subplots(2, 1, sharex=True)
        weight.plot(step, c, ".", color=BLUE, markersize=3)
        weight.set_title(f"c ends at {last_c}")
        for label, (shown, colour) in groups.items():
            if shown.any():
                variance.plot(step[shown], left[shown], ".", color=colour, markersize=3, label=label)
        variance.step(step, line, where="post", label="1/q: a batch of the same cost", **dashed)
        variance.set(title=title, xlabel="step", ylim=(0, HIGHEST))
        variance.legend(loc="upper right")

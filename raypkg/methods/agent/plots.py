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
    corrected = column(steps, "corrected") == 1
    known = np.isfinite(left)
    last_c = f"{c[-1]:.3g}" if len(c) else "–"
    median = f"{np.median(left[known]):.2g}" if known.any() else "–"

    with page(path) as figure:
        weight, variance = figure.subplots(2, 1, sharex=True)
        weight.plot(step, c, ".", color=BLUE, markersize=3)
        weight.set_title(f"c ends at {last_c}")

        for label, of_label, colour in (("corrected", corrected, BLUE), ("looked at", ~corrected, GREY)):
            shown = known & of_label
            if shown.any():
                variance.plot(step[shown], left[shown], ".", color=colour, markersize=3, label=label)
        line = column(steps, "line")
        label = "1/q: a batch of the same cost"
        variance.step(step, line, where="post", label=label, color=VERMILLION, linestyle="--", linewidth=1)
        variance.set_title(f"Share of the gradients' variance that is left: {median} (median)")
        variance.set_xlabel("step")
        variance.set_ylim(0, HIGHEST)
        variance.legend(loc="upper right")

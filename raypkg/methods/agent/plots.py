"""The picture of AGENT."""

from pathlib import Path

import numpy as np

from raypkg.runs.plots import BLUE, Rows, column, page
from raypkg.runs.style import GREY, VERMILLION

HIGHEST = 1.5  # share of the variance that is drawn: a correction may add to it


def correction(steps: Rows, path: str | Path) -> None:
    """Draw AGENT's weight c, and the variance that is left beside that of a batch of the same cost.

    Args:
        steps: dicts with ``step``, ``corrected`` (0 where it was only looked at), ``c``, ``left`` (NaN where it is not
            known) and ``line``, 1/q.
        path: the PNG to write.
    """
    step = column(steps, "step")
    c = column(steps, "c")
    left = column(steps, "left")
    line = column(steps, "line")
    corrected = column(steps, "corrected") == 1
    known = np.isfinite(left)
    mean = f"{np.median(left[known]):.2g}" if known.any() else "–"
    last_c = f"{c[-1]:.3g}" if len(c) else "–"
    with page(path) as figure:
        weight, variance = figure.subplots(2, 1, sharex=True)
        weight.plot(step, c, ".", color=BLUE, markersize=3)
        weight.set(title=f"c ends at {last_c}")
        for chosen, colour, label in ((corrected, BLUE, "corrected"), (~corrected, GREY, "looked at")):
            shown = known & chosen
            if shown.any():
                variance.plot(step[shown], left[shown], ".", color=colour, markersize=3, label=label)
        variance.step(
            step,
            line,
            where="post",
            color=VERMILLION,
            linestyle="--",
            linewidth=1,
            label="1/q: a batch of the same cost",
        )
        variance.set_ylim(0, HIGHEST)
        variance.set(title=f"Share of the gradients' variance that is left: {mean} (median)", xlabel="step")
        variance.legend(loc="upper right")

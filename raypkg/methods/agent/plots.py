"""The picture of AGENT."""

from pathlib import Path

import numpy as np

from raypkg.runs.plots import BLUE, Rows, column, page


def correction(steps: Rows, path: str | Path) -> None:
    """Draw AGENT's weight c, and how alike the gradients of model and snapshot are.

    Args:
        steps: dicts with ``step``, ``c`` and ``cosine`` (NaN where c was 0).
        path: the PNG to write.
    """
    step = column(steps, "step")
    c = column(steps, "c")
    cosine = column(steps, "cosine")
    known = np.isfinite(cosine)  # not where c was 0
    mean = f"{cosine[known].mean():.2g}" if known.any() else "–"
    with page(path) as figure:
        weight, alike = figure.subplots(2, 1, sharex=True)
        weight.step(step, c, where="post", color=BLUE)
        weight.set(title=f"c ends at {c[-1]:.3g}")
        alike.plot(
            step[known],
            cosine[known],
            color=BLUE,
            alpha=0.5,
            linewidth=1,
        )
        title = f"Cosine of a batch's gradient with the snapshot's: {mean} on average"
        alike.set(title=title, xlabel="step")

"""The plot of an audit."""

from pathlib import Path

import numpy as np

from raypkg.runs.plots import BLUE, VERMILLION, count_axis, page


def harm(scores: np.ndarray, wrong: np.ndarray | None, name: str, path: str | Path) -> None:
    """Draw the histogram of all scores [n] and, if they are known, that of the wrong labels, bool [n], within it."""
    edges = np.histogram_bin_edges(scores, min(60, 1 + len(scores) // 4)).tolist()
    title = f"The highest of {len(scores):,} scores is {scores.max():.3g}, the median {np.median(scores):.3g}"
    with page(path) as figure:
        axes = figure.subplots()
        axes.hist(scores, edges, color=BLUE, alpha=0.5, label=f"all {len(scores):,} samples")
        if wrong is not None:
            axes.hist(scores[wrong], edges, color=VERMILLION, label=f"the {wrong.sum():,} with wrong labels")
            worst = np.argsort(-scores, kind="stable")[: wrong.sum()]
            title = f"{wrong[worst].mean():.0%} of the {wrong.sum():,} highest scores have wrong labels"
        axes.set_title(title)
        axes.set(xlabel=name, ylabel="samples", yscale="log")
        count_axis(axes.yaxis)
        axes.legend(loc="upper right")

"""The pictures of CREST."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypkg.runs.plots import BLUE, GREY, NOTE, ORANGE, VERMILLION, Rows, column, line_ends, page, short

if TYPE_CHECKING:
    from raypkg.runs.plots import Axes

TINY = 1e-9  # of what may be 0, on a logarithmic axis


def regions(checks: Rows, tau: float, path: str | Path) -> None:
    """Draw CREST's checks: the local model's error, how long it was trusted, what was excluded, what a coreset misses.

    Args:
        checks: dicts with ``step``, ``update``, ``rho``, ``interval``, ``pool``, ``active`` (samples), and root mean
            squares ``coreset_error`` and ``random_error``.
        tau: the error at which the model expires.
        path: the PNG to write.
    """
    with page(path) as figure:
        (error, trust), (samples, misses) = figure.subplots(2, 2, sharex=True)
        _draw_error(error, checks, tau)
        _draw_trust(trust, checks)
        _draw_active(samples, checks)
        _draw_misses(misses, checks)
        for axes in (error, trust, misses):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter("")
            axes.margins(y=0.2)


def choices(rows: Rows, path: str | Path) -> None:
    """Draw what was excluded, and what a coreset misses, where every step chooses anew.

    Args:
        rows: dicts with ``step``, ``active`` (samples), and root mean squares ``coreset_error`` and ``random_error``.
        path: the PNG to write.
    """
    with page(path) as figure:
        samples, misses = figure.subplots(1, 2)
        _draw_active(samples, rows)
        _draw_misses(misses, rows)
        misses.set_yscale("log")


def _draw_error(axes: "Axes", checks: Rows, tau: float) -> None:
    step = column(checks, "step")
    rho = column(checks, "rho").clip(min=TINY)  # on a logarithmic axis
    axes.plot(step, rho, color=BLUE, alpha=0.5, linewidth=1)
    axes.axhline(tau, color=VERMILLION, linestyle="--")
    label = f"τ = {tau:g}"
    axes.annotate(label, (0, tau), (4, 4), color=VERMILLION, **NOTE)
    expired = np.mean(rho > tau)
    axes.set_title(f"ρ exceeds τ at {expired:.0%} of the checks")


def _draw_trust(axes: "Axes", checks: Rows) -> None:
    step = column(checks, "step")
    interval = column(checks, "interval")
    pool = column(checks, "pool")
    axes.step(step, interval, where="post", color=BLUE)
    axes.step(step, pool, where="post", color=ORANGE)
    ends = {
        "T1, steps between checks": (interval[-1], BLUE),
        "P, coresets": (pool[-1], ORANGE),
    }
    line_ends(axes, step[-1], ends)
    pools = column(checks, "update").max()
    steps = step.max()
    axes.set_title(f"{pools:.0f} pools in {steps:,.0f} steps")


def _draw_active(axes: "Axes", checks: Rows) -> None:
    step = column(checks, "step")
    active = column(checks, "active")
    axes.plot(step, active, color=BLUE)
    left = short(active[-1])
    axes.set_title(f"{left} samples are still active")
    axes.set_xlabel("step")
    axes.set_ylim(0, None)


def _draw_misses(axes: "Axes", checks: Rows) -> None:
    step = column(checks, "step")
    of_coresets = column(checks, "coreset_error").clip(min=TINY)
    of_random = column(checks, "random_error").clip(min=TINY)
    axes.plot(step, of_coresets, color=BLUE, linewidth=1)
    axes.plot(step, of_random, color=GREY, linewidth=1)
    ends = {
        "coreset": (of_coresets[-1], BLUE),
        "random batch": (of_random[-1], GREY),
    }
    line_ends(axes, step[-1], ends)
    ratio = np.nanmean(of_random) / np.nanmean(of_coresets)
    axes.set_title(f"Gradient error: 1/{ratio:.2g} of a random batch's")
    axes.set_xlabel("step")


def minibatches(difficulty: np.ndarray, counts: np.ndarray, path: str | Path) -> None:
    """Draw how hard the samples were that each pool picked, and how often each sample was trained on.

    Args:
        difficulty: mean times forgotten, by the end of training, of each pool's picks; NaN where it picked none [l].
        counts: steps that trained on each sample [n].
        path: the PNG to write.
    """
    with page(path) as figure:
        hard, often = figure.subplots(1, 2)
        _draw_difficulty(hard, difficulty)
        _draw_counts(often, counts)


def _draw_difficulty(axes: "Axes", difficulty: np.ndarray) -> None:
    pools = len(difficulty)
    numbers = np.arange(1, pools + 1)
    axes.plot(numbers, difficulty, color=BLUE, alpha=0.5, linewidth=1)
    tenths = np.array_split(difficulty, 10)  # one pool's mean is noise
    means = [np.nanmean(tenth) for tenth in tenths if np.isfinite(tenth).any()]
    width = pools / max(len(means), 1)
    middles = (np.arange(len(means)) + 0.5) * width
    axes.plot(middles, means, color=VERMILLION, linewidth=2.2)
    first = means[0] if means else np.nan
    last = means[-1] if means else np.nan
    axes.set_title(f"Picks were forgotten {first:.2g} times at first, {last:.2g} at last")
    axes.set_xlabel("pool")
    axes.set_ylabel("times forgotten by the end, mean of the picks")


def _draw_counts(axes: "Axes", counts: np.ndarray) -> None:
    edges = np.arange(counts.max() + 2) - 0.5
    axes.hist(counts, edges.tolist(), color=BLUE)
    used = np.mean(counts > 0)
    axes.set_title(f"{used:.0%} of the samples were trained on")
    axes.set_xlabel("steps that trained on it")
    axes.set_ylabel("samples")
    axes.yaxis.set_major_formatter(lambda value, _: short(value))


def difficulty_of_picks(picked: np.ndarray, forgotten: np.ndarray) -> np.ndarray:
    """Return how often the picks of each pool were forgotten by the end, on average; NaN where it picked none [l].

    Args:
        picked: (update, sample) of every pick, updates from 1, int [2, ·].
        forgotten: times that each sample was forgotten, ∞ for one that was never learned [n].
    """
    pools = picked[0] - 1
    times = forgotten[picked[1]]
    learned = np.isfinite(times)
    count = pools.max() + 1
    sums = np.bincount(pools[learned], times[learned], count)
    picks = np.bincount(pools[learned], None, count)
    with np.errstate(invalid="ignore"):
        return sums / picks

"""The plots of CREST; every function writes one PNG."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypkg.runs.plots import BLUE, GREY, NOTE, ORANGE, VERMILLION, Rows, column, line_ends, page, short

if TYPE_CHECKING:
    from raypkg.runs.plots import Axes

TINY = 1e-9  # replaces 0 on a logarithmic axis


def regions(checks: Rows, tau: float, path: str | Path) -> None:
    """Plot CREST's checks: ρ against τ, T1 and P, the active samples, and the gradient errors of coresets.

    ``checks`` are dicts with ``step``, ``update``, ``rho``, ``interval``, ``pool``, ``active`` (samples), and the root
    mean squares ``coreset_error`` and ``random_error``.
    """
    step = column(checks, "step")
    with page(path) as figure:
        (error, trust), (samples, misses) = figure.subplots(2, 2, sharex=True)
        rho = column(checks, "rho").clip(min=TINY)
        error.plot(step, rho, color=BLUE, alpha=0.5, linewidth=1)
        error.axhline(tau, color=VERMILLION, linestyle="--")
        error.annotate(f"τ = {tau:g}", (0, tau), (4, 4), color=VERMILLION, **NOTE)
        expired = np.mean(rho > tau)
        error.set_title(f"ρ exceeds τ at {expired:.0%} of the checks")

        interval = column(checks, "interval")
        pool = column(checks, "pool")
        trust.step(step, interval, where="post", color=BLUE)
        trust.step(step, pool, where="post", color=ORANGE)
        ends = {"T1, steps between checks": (interval[-1], BLUE), "P, coresets": (pool[-1], ORANGE)}
        line_ends(trust, step[-1], ends)
        pools = column(checks, "update").max()
        trust.set_title(f"{pools:.0f} pools in {step.max():,.0f} steps")

        _draw_active(samples, checks)
        _draw_misses(misses, checks)
        for axes in (error, trust, misses):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter("")
            axes.margins(y=0.2)


def choices(rows: Rows, path: str | Path) -> None:
    """Plot active samples and gradient errors of coresets chosen at every step, from rows as of ``regions``."""
    with page(path) as figure:
        samples, misses = figure.subplots(1, 2)
        _draw_active(samples, rows)
        _draw_misses(misses, rows)
        misses.set_yscale("log")


def _draw_active(axes: "Axes", rows: Rows) -> None:
    active = column(rows, "active")
    axes.plot(column(rows, "step"), active, color=BLUE)
    axes.set_title(f"{short(active[-1])} samples are still active")
    axes.set_xlabel("step")
    axes.set_ylim(0, None)


def _draw_misses(axes: "Axes", rows: Rows) -> None:
    step = column(rows, "step")
    of_coresets = column(rows, "coreset_error").clip(min=TINY)
    of_random = column(rows, "random_error").clip(min=TINY)
    axes.plot(step, of_coresets, color=BLUE, linewidth=1)
    axes.plot(step, of_random, color=GREY, linewidth=1)
    line_ends(axes, step[-1], {"coreset": (of_coresets[-1], BLUE), "random batch": (of_random[-1], GREY)})
    ratio = np.nanmean(of_random) / np.nanmean(of_coresets)
    axes.set_title(f"Gradient error: 1/{ratio:.2g} of a random batch's")
    axes.set_xlabel("step")


def minibatches(difficulty: np.ndarray, counts: np.ndarray, path: str | Path) -> None:
    """Plot the difficulty of each pool's picks, [l], and the number of steps that trained on each sample, [n]."""
    with page(path) as figure:
        hard, often = figure.subplots(1, 2)
        pools = len(difficulty)
        hard.plot(np.arange(1, pools + 1), difficulty, color=BLUE, alpha=0.5, linewidth=1)
        tenths = np.array_split(difficulty, 10)  # one pool's mean is noise
        means = [np.nanmean(tenth) for tenth in tenths if np.isfinite(tenth).any()]
        middles = (np.arange(len(means)) + 0.5) * pools / max(len(means), 1)
        hard.plot(middles, means, color=VERMILLION, linewidth=2.2)
        first, last = (means[0], means[-1]) if means else (np.nan, np.nan)
        hard.set_title(f"Picks were forgotten {first:.2g} times at first, {last:.2g} at last")
        hard.set_xlabel("pool")
        hard.set_ylabel("times forgotten by the end, mean of the picks")

        edges = np.arange(counts.max() + 2) - 0.5
        often.hist(counts, edges.tolist(), color=BLUE)
        used = np.mean(counts > 0)
        often.set_title(f"{used:.0%} of the samples were trained on")
        often.set_xlabel("steps that trained on it")
        often.set_ylabel("samples")
        often.yaxis.set_major_formatter(lambda value, _: short(value))


def difficulty_of_picks(picked: np.ndarray, forgotten: np.ndarray) -> np.ndarray:
    """Return the mean number of times that each pool's picks were forgotten; NaN without any learned pick, [l].

    ``picked`` has (update, sample) of every pick, updates from 1, int [2, ·]. ``forgotten`` counts the times that each
    sample was forgotten by the end, ∞ if it was never learned, [n].
    """
    pools = picked[0] - 1
    times = forgotten[picked[1]]
    learned = np.isfinite(times)
    count = pools.max() + 1
    sums = np.bincount(pools[learned], times[learned], count)
    picks = np.bincount(pools[learned], None, count)
    with np.errstate(invalid="ignore"):
        return sums / picks

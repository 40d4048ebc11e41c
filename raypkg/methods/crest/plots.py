"""The plots of CREST; every function writes one PNG."""

from pathlib import Path

import numpy as np

from raypkg.runs.plots import BLUE, NOTE, ORANGE, VERMILLION, Rows, column, line_ends, page, short

TINY = 1e-9  # replaces 0 on a logarithmic axis


def checks(rows: Rows, tau: float, path: str | Path) -> None:
    """Plot CREST's table, dicts with ``step``, ``update``, ``rho``, ``interval``, ``pool`` and ``active`` (samples)."""
    step = column(rows, "step")
    rho = column(rows, "rho").clip(min=TINY)
    expired = np.mean(rho > tau)
    interval = column(rows, "interval")
    pool = column(rows, "pool")
    pools = column(rows, "update").max()
    active = column(rows, "active")
    with page(path) as figure:
        error, trust, samples = figure.subplots(3, 1, sharex=True)
        for axes in (error, trust):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter("")
            axes.margins(y=0.2)

        error.plot(step, rho, color=BLUE, alpha=0.5, linewidth=1)
        error.axhline(tau, color=VERMILLION, linestyle="--")
        error.annotate(f"τ = {tau:g}", (0, tau), (4, 4), color=VERMILLION, **NOTE)
        error.set_title(f"ρ exceeds τ at {expired:.0%} of the checks")

        ends = {"T1, steps": (interval[-1], BLUE), "P, coresets": (pool[-1], ORANGE)}
        trust.step(step, interval, where="post", color=BLUE)
        trust.step(step, pool, where="post", color=ORANGE)
        line_ends(trust, step[-1], ends)
        trust.set_title(f"{pools:.0f} pools in {step.max():,.0f} steps")

        samples.plot(step, active, color=BLUE)
        samples.set(title=f"{short(active[-1])} samples are still active", xlabel="step", ylim=(0, None))


def minibatches(difficulty: np.ndarray, counts: np.ndarray, path: str | Path) -> None:
    """Plot the difficulty of each pool's picks, [l], and the number of steps that trained on each sample, [n]."""
    pools = np.arange(1, len(difficulty) + 1)
    tenths = np.array_split(difficulty, 10)  # one pool's mean is noise
    means = [np.nanmean(tenth) for tenth in tenths if np.isfinite(tenth).any()]
    first, last = (means[0], means[-1]) if means else (np.nan, np.nan)
    middles = (np.arange(len(means)) + 0.5) * len(pools) / max(len(means), 1)
    used = np.mean(counts > 0)
    edges = np.arange(counts.max() + 2) - 0.5
    with page(path) as figure:
        hard, often = figure.subplots(1, 2)

        hard.plot(pools, difficulty, color=BLUE, alpha=0.5, linewidth=1)
        hard.plot(middles, means, color=VERMILLION, linewidth=2.2)
        hard.set_title(f"Picks were forgotten {first:.2g} times at first, {last:.2g} at last")
        hard.set(xlabel="pool", ylabel="times forgotten by the end, mean of the picks")

        often.hist(counts, edges.tolist(), color=BLUE)
        often.set_title(f"{used:.0%} of the samples were trained on")
        often.set(xlabel="steps that trained on it", ylabel="samples")
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

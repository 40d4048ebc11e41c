"""The pictures of CREST."""

from pathlib import Path

import numpy as np

from raypkg.runs.plots import BLUE, GREY, NOTE, ORANGE, TINY, VERMILLION, Rows, column, line_ends, page, short


def regions(checks: Rows, tau: float, path: str | Path) -> None:
    """Draw CREST's checks: the local model's error, how long it was trusted, what was dropped, what a coreset misses.

    Args:
        checks: dicts with ``step``, ``update``, ``rho``, ``interval``, ``pool``, ``active`` (samples), and root mean
            squares ``coreset_error`` and ``random_error``.
        tau: the error at which the model expires.
        path: the PNG to write.
    """
    step, update, rho = (column(checks, key) for key in ("step", "update", "rho"))
    rho = rho.clip(min=TINY)  # on a logarithmic axis
    active, interval, pool = (column(checks, key) for key in ("active", "interval", "pool"))
    with page(path) as figure:
        (error, trust), (samples, misses) = figure.subplots(2, 2, sharex=True)
        error.plot(step, rho, color=BLUE, alpha=0.5, linewidth=1)
        error.axhline(tau, color=VERMILLION, linestyle="--")
        error.annotate(f"τ = {tau:g}", (0, tau), (4, 4), color=VERMILLION, **NOTE)
        error.set(title=f"ρ exceeds τ at {np.mean(rho > tau):.0%} of the checks")
        trust.step(step, interval, where="post", color=BLUE)
        trust.step(step, pool, where="post", color=ORANGE)
        line_ends(
            trust, step[-1], {"T1, steps between checks": (interval[-1], BLUE), "P, coresets": (pool[-1], ORANGE)}
        )
        trust.set(title=f"{update.max():.0f} pools in {step.max():,.0f} steps")
        samples.plot(step, active, color=BLUE)
        samples.set(title=f"{short(active[-1])} samples are still active", xlabel="step", ylim=(0, None))
        ours, random = (column(checks, key).clip(min=TINY) for key in ("coreset_error", "random_error"))
        misses.plot(step, ours, color=BLUE, linewidth=1)
        misses.plot(step, random, color=GREY, linewidth=1)
        line_ends(misses, step[-1], {"coreset": (ours[-1], BLUE), "random batch": (random[-1], GREY)})
        ratio = np.nanmean(random) / np.nanmean(ours)
        misses.set(title=f"Gradient error: 1/{ratio:.2g} of a random batch's", xlabel="step")
        for axes in (error, trust, misses):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter("")
            axes.margins(y=0.2)


def minibatches(difficulty: np.ndarray, counts: np.ndarray, path: str | Path) -> None:
    """Draw how hard the samples were that each pool picked, and how often each sample was trained on.

    Args:
        difficulty: mean times forgotten, by the end of training, of each pool's picks; NaN where it picked none [l].
        counts: steps that trained on each sample [n].
        path: the PNG to write.
    """
    with page(path) as figure:
        hard, often = figure.subplots(1, 2)
        hard.plot(np.arange(1, len(difficulty) + 1), difficulty, color=BLUE, alpha=0.5, linewidth=1)
        parts = [part for part in np.array_split(difficulty, 10) if len(part) and np.isfinite(part).any()]
        middles = (np.arange(len(parts)) + 0.5) * len(difficulty) / max(len(parts), 1)
        means = [np.nanmean(part) for part in parts]
        hard.plot(middles, means, color=VERMILLION, linewidth=2.2)
        first, last = (means[0], means[-1]) if means else (np.nan, np.nan)
        hard.set(title=f"Picks were forgotten {first:.2g} times at first, {last:.2g} at last", xlabel="pool")
        hard.set_ylabel("times forgotten by the end, mean of the picks")
        often.hist(counts, np.arange(counts.max() + 2) - 0.5, color=BLUE)
        often.set(title=f"{np.mean(counts > 0):.0%} of the samples were trained on", xlabel="steps that trained on it")
        often.set_ylabel("samples")
        often.yaxis.set_major_formatter(lambda value, _: short(value))

"""The plot of CREST."""

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

        ends = {f"T1 = {interval[-1]:g} steps": (interval[-1], BLUE), f"P = {pool[-1]:g} coresets": (pool[-1], ORANGE)}
        trust.step(step, interval, where="post", color=BLUE)
        trust.step(step, pool, where="post", color=ORANGE)
        line_ends(trust, step[-1], ends)
        trust.set_title(f"{pools:.0f} pools in {step.max():,.0f} steps")

        samples.plot(step, active, color=BLUE)
        samples.set(title=f"{short(active[-1])} samples are still active", xlabel="step", ylim=(0, None))

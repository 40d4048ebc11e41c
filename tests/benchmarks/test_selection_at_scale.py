"""Selection for a thousand classes, each view made, used and dropped in turn. Run with: pytest -m bench -s."""

import json
import re
import sys
import time
from functools import cache
from itertools import cycle
from pathlib import Path

import pytest
import torch

import measured
from raypkg.core.seeds import generator
from raypkg.coresets.budgets import budget_of, select_class
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.rules import coreset
from raypkg.engine.worker import keep_freed_memory
from raypkg.runs.plots import BLUE, GREY, ORANGE, VERMILLION, Rows, column, page, short

pytestmark = pytest.mark.bench
CLASSES, WIDTH, FRACTION = 1000, 512, 0.01
METHODS = ("grand", "glister", "gradmatch", "craig")
SAMPLES = (10_000, 40_000, 160_000, 1_280_000)
PICTURE = Path(__file__).with_suffix(".png")


@pytest.mark.timeout(14400)
def test_a_thousand_classes():
    rows = []
    for n in SAMPLES:
        print(
            f"\nn = {n:,}, C = {CLASSES}, D = {WIDTH}, fraction {FRACTION}, {n // CLASSES} samples a class, one thread"
        )
        for name in METHODS:
            rows.append({"rule": name, "n": n, **measured.in_fresh_process(__file__, name, n)})
            print("  {rule:<12}{seconds:>9.1f} s{MiB:>9.0f} MiB resident at the peak".format(**rows[-1]))
    scaling(rows, PICTURE)


def scaling(measured: Rows, path: str | Path) -> None:
    """Draw seconds and peak resident MiB against the number of samples, a line for each rule."""
    with page(path) as figure:
        time, memory = figure.subplots(1, 2)
        rules = list(dict.fromkeys(row["rule"] for row in measured))
        for rule, colour in zip(rules, cycle([BLUE, ORANGE, VERMILLION, GREY]), strict=False):
            rows = sorted((row for row in measured if row["rule"] == rule), key=lambda row: row["n"])
            n, seconds, mib = (column(rows, key) for key in ("n", "seconds", "MiB"))
            for axes, values in ((time, seconds), (memory, mib)):
                axes.plot(n, values, color=colour, marker="o", markersize=4, label=rule)
        most = max((row["n"] for row in measured), default=0)
        time.set(title=f"Seconds of selection, to {short(most)} samples", xlabel="samples", yscale="log")
        memory.set(title="Peak resident MiB of the process", xlabel="samples", ylim=(0, None))
        time.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for axes in (time, memory):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: short(value))
            axes.xaxis.set_minor_formatter("")
            axes.margins(x=0.1, y=0.1)
        if rules:
            time.legend()


@cache
def head():
    means = torch.randn(CLASSES, WIDTH, generator=generator(0, "means"))  # [C, D]
    weight = means.relu() * (20 / WIDTH)
    return means, weight, -0.5 * (weight * means.relu()).sum(dim=1)


def of_class(label, n):
    """Return a view of one class: ReLU(class mean + noise of a log-normal size), seen by a head that knows the means.

    Most samples are easy and some are hard, so that residuals are heavy-tailed.
    """
    rng, (means, weight, bias) = generator(0, "samples", label), head()
    noise = torch.randn(n, 1, generator=rng).mul(0.7).exp() * torch.randn(n, WIDTH, generator=rng)
    features = (means[label] + noise).relu_()  # [n, D]
    return HeadView(features @ weight.T + bias, features, torch.full((n,), label))


def select_all(name, n):
    """Return the processor's seconds in the selection alone and the peak of the whole process."""
    keep_freed_memory()  # as in a run
    seconds, share = 0.0, n // CLASSES
    for label in range(CLASSES):
        view = of_class(label, share)
        start = time.process_time()
        select_class(view, budget_of(FRACTION, share), coreset[name], seed=0, label=label, options={})
        seconds += time.process_time() - start
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    return {"seconds": seconds, "MiB": int(peak) / 1024}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(select_all(sys.argv[1], int(sys.argv[2]))))

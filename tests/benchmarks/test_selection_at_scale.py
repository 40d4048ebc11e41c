"""Selection for a thousand classes, each view made, used and dropped in turn. Run with: pytest -m bench -s."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

import measured
import simulated
from raypkg.methods.coresets import coreset
from raypkg.methods.selection import budget_of, select_class
from raypkg.runs import plots

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
            rows.append({"method": name, "n": n, **measured.in_fresh_process(__file__, name, n)})
            print("  {method:<12}{seconds:>9.1f} s{MiB:>9.0f} MiB resident at the peak".format(**rows[-1]))
    plots.scaling(rows, PICTURE)


def select_all(name, n):
    """Return the seconds of the selection alone and the peak of the whole process."""
    seconds, share = 0.0, n // CLASSES
    for label in range(CLASSES):
        view = simulated.of_class(label, share, CLASSES, WIDTH)
        start = time.perf_counter()
        select_class(view, budget_of(FRACTION, share), coreset[name], seed=0, label=label, options={})
        seconds += time.perf_counter() - start
    return {"seconds": seconds, "MiB": measured.peak()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(select_all(sys.argv[1], int(sys.argv[2]))))

"""GLISTER and CRAIG as they are by default against plain forms over gradients spelt out, in turn on one thread.

In seconds of the processor, class by class, each side's median. Run with: pytest -m bench -s.
"""

import json
import sys
import time
from statistics import median

import pytest
import torch

import materialised
import measured
import simulated
from raypkg.coresets.budgets import select

pytestmark = pytest.mark.bench
CLASSES, WIDTH, TENTH, TURNS = 10, 512, 10, 9


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name, n", [("glister", 50_000), ("craig", 10_000)])
def test_in_turn(name, n):
    print(
        "\n{name}, n = {n:,}: {ours:.3f} s, plainly {theirs:.3f} s, {ratio:.2f} times as long".format(
            **measured.in_fresh_process(__file__, name, n)
        )
    )


def largest_gains(rows, k):
    """DeepCore's choice: one pass over all gradients, never refreshed."""
    gains = rows @ rows.mean(dim=0)
    return gains.topk(k).indices


def plain_greedy(rows, k):
    """Over all distances."""
    ((_, picked, _),) = materialised.craig(rows, [k])
    return picked


PLAIN = {"glister": largest_gains, "craig": plain_greedy}


def plainly(name, view):
    n = len(view) // CLASSES
    for start in range(0, len(view), n):
        rows = materialised.gradients(view[start : start + n])
        PLAIN[name](rows, n // TENTH)


def in_turn(name, n):
    view = simulated.of_all(n, CLASSES, WIDTH)
    sides = {"ours": lambda: select(view, n // TENTH, name, seed=0), "theirs": lambda: plainly(name, view)}
    seconds = {side: [] for side in sides}
    for _ in range(TURNS):
        for side, function in sides.items():
            before = time.process_time()
            function()
            seconds[side].append(time.process_time() - before)
    return {side: median(taken[1:]) for side, taken in seconds.items()}  # the first call warms up


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, n = sys.argv[1], int(sys.argv[2])
    found = in_turn(name, n)
    print(json.dumps({"name": name, "n": n, **found, "ratio": found["theirs"] / found["ours"]}))

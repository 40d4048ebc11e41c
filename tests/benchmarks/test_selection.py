"""Every coreset rule against its straightforward form, which spells all gradients out. Run with: pytest -m bench -s.

Class by class, both sides on two threads, every measurement in a process of its own. What would take the
straightforward form hours runs at a few small sizes on one class, and its seconds are extrapolated.
"""

import json
import math
import sys
import time

import pytest
import torch

import materialised
import measured
import simulated
from raypkg.coresets.budgets import budget_of, select, select_class
from raypkg.coresets.rules import coreset

pytestmark = pytest.mark.bench
N, CLASSES, WIDTH, FRACTION, LAM = 50_000, 10, 512, 0.1, 0.5
PARTS = (0.02, 0.04, 0.08, 0.12, 0.2)  # of a class's budget: where the straightforward form is extrapolated from


@pytest.mark.timeout(7200)
def test_rules_against_their_straightforward_form(n=N):
    print(f"\nn = {n:,}, C = {CLASSES}, D = {WIDTH}, fraction {FRACTION}, class by class; ours, theirs, theirs / ours")
    print(f"  {'':<12}{'seconds':^28}{'peak extra MiB':^28}{'objective on class 0':^28}")
    for name in coreset.entries:
        if coreset[name].sees == "gradients" and not coreset[name].sizes_itself:
            sides = [measured.in_fresh_process(__file__, side, name, n) for side in ("ours", "theirs")]
            cells = "".join(cell(*(side.get(what) for side in sides)) for what in ("seconds", "MiB", "objective"))
            print(f"  {name:<12}{cells}  {sides[1].get('note', '')}")


AS_PUBLISHED = {  # as the straightforward forms compute; gradmatchpb's batches mix the classes all the same
    "glister": {"eta": 0.01, "rounds": 20},
    "gradmatch": {"relative": False, "normalise": False},
    "gradmatchpb": {"lam": 0.5, "relative": False},
}


def cell(ours, theirs):
    if theirs is None:
        return f"{ours:>9.3g}{'':19}"
    return f"{ours:>9.3g}{theirs:>9.3g}{theirs / max(ours, 1e-9):>8.3g}x "


def ours(name, view, k):
    """Select from all classes; the objective is that of the first one, at the size that the other side reaches."""
    options = AS_PUBLISHED.get(name, {})
    memory, _ = measured.peak_of(lambda: select(view, k * CLASSES, name, seed=0, options=options))
    seconds = measured.seconds_of(lambda: select(view, k * CLASSES, name, seed=0, options=options))
    first, size = class_of(view, 0), sizes(k)[-1] if name in materialised.GROWTHS else k
    picked = select_class(first, size, coreset[name], seed=0, label=0, options=options)
    return {"seconds": seconds, "MiB": memory, "objective": objective(name, first, picked.indices, picked.weights)}


def theirs(name, view, k):
    """Do the same in the straightforward form, if there is one that differs."""
    if name in materialised.GROWTHS:
        memory, (seconds, picked, note) = measured.peak_of(lambda: in_part(name, view, k))
    elif name in materialised.METHODS | materialised.PLAIN:
        memory, picked = measured.peak_of(lambda: in_full(name, view, k))
        seconds, note = measured.seconds_of(lambda: in_full(name, view, k)), ""
    else:
        return {}
    return {"seconds": seconds, "MiB": memory, "objective": objective(name, class_of(view, 0), *picked), "note": note}


def in_full(name, view, k):
    """Select from all classes and return the picks of the first."""
    views = [class_of(view, label) for label in range(CLASSES)]
    if name in materialised.PLAIN:
        picked = [materialised.PLAIN[name](part, k) for part in views]
    else:
        rows = materialised.gradients(view).chunk(CLASSES)
        picked = [materialised.METHODS[name](*part, k) for part in zip(views, rows, strict=True)]
    return picked[0]


def in_part(name, view, k):
    start, rows = time.perf_counter(), materialised.gradients(view)
    spelt_out = time.perf_counter() - start
    rule, powers = materialised.GROWTHS[name]
    seconds, indices, weights = zip(*rule(rows.chunk(CLASSES)[0], sizes(k)), strict=True)
    basis = torch.tensor(sizes(k))[:, None].double() ** torch.tensor(powers)
    fit = torch.linalg.lstsq(basis, torch.tensor(seconds).double()).solution
    terms = " + ".join(f"{a:.2g} k^{power}" for a, power in zip(fit.tolist(), powers, strict=True))
    note = f"extrapolated to k = {k} from k = {sizes(k)}, {', '.join(f'{s:.2f}' for s in seconds)} s a class: {terms}"
    total = spelt_out + CLASSES * float((fit * float(k) ** torch.tensor(powers)).sum())
    return total, (indices[-1], weights[-1]), note


def objective(name, view, indices, weights):
    """Σ min d for medoids, the radius for centres, else ‖Σ v g − ḡ‖² + λ‖v‖² with v = w / k."""
    if name == "craig":
        return float(view.distances(view[indices]).min(dim=1).values.sum())
    if name == "kcenter":
        return float(torch.cdist(view.features, view.features[indices]).min(dim=1).values.max())
    v, exact = weights.double() / len(weights), view.double()
    return float((exact[indices].sum(v) - exact.mean()).square().sum() + LAM * v.square().sum())


def sizes(k):
    return [math.ceil(part * k) for part in PARTS]


def class_of(view, label):
    n = len(view) // CLASSES
    return view[label * n : (label + 1) * n]


if __name__ == "__main__":
    side, rule, count = sys.argv[1:]
    torch.set_num_threads(2)
    made = simulated.of_all(int(count), CLASSES, WIDTH)
    share = budget_of(FRACTION, int(count) // CLASSES)
    print(json.dumps({"ours": ours, "theirs": theirs}[side](rule, made, share)))

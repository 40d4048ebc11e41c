"""DeltaGrad's answers against retraining, by the estimator: seconds, ratio and distance.

    python tests/benchmarks/deltagrad.py --dataset parquet:path/to/mnist --set epochs=32 weight_decay=0.005 burn_in=10

`effray compare deltagrad --scale paper` has the paper's own cases. Both sides compute gradients by the same function
and run in turn, in one process; medians of --repeats. DeltaGrad pays for its history and its log.
``w`` is the model before the request, ``U`` the retrained one and ``I`` DeltaGrad's.
"""

import argparse
import ast
import copy
import statistics
import time

import torch

from raypkg import DeltaGrad, load_data
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.experiments.samples import new_model
from raypkg.methods.deltagrad.answer import verify
from raypkg.methods.deltagrad.settings import Holders

SHARES = (5e-5, 1e-3, 1e-2, 0.1, 0.2)


def timed(call, *arguments):
    """Return seconds, and the result."""
    start = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - start, result


def away(model, other):
    return (model._run.weights() - other._run.weights()).norm().item()


def exact(model, change):
    """Return the retrained model: a replay of exact steps ends there, to 1e-12."""
    twin = copy.deepcopy(model).set_params(period=1)
    change(twin)
    return twin


def answers(model, change, repeats):
    """Return the median seconds of retraining and of an answer, and the answered model."""
    seconds = []
    for _ in range(repeats):
        twin = copy.deepcopy(model)
        answered, _ = timed(change, twin)
        seconds.append((verify(twin._run, Holders(cpus_per_worker=torch.get_num_threads())).seconds, answered))
    return *map(statistics.median, zip(*seconds, strict=True)), twin


def table(title, *columns):
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")


def shares(new, x, y, repeats):
    """Delete a share of the samples, or add it."""
    table("a share", "request", "share", "retrain s", "DeltaGrad s", "ratio", "‖w − U‖", "‖U − I‖")
    everyone = new().fit(x, y)
    for share in (share for share in SHARES if share * len(x) >= 1):
        some = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[: round(share * len(x))]
        rest = torch.ones(len(x), dtype=torch.bool).index_fill(0, some, False)
        for request, model, change in (
            ("delete", everyone, lambda model, some=some: model.delete(some)),
            ("add", new().fit(x[rest], y[rest]), lambda model, some=some: model.add(x[some], y[some])),
        ):
            slow, fast, twin = answers(model, change, repeats)
            retrained = exact(model, change)
            distances = f"{away(model, retrained):.1e} | {away(twin, retrained):.1e}"
            print(f"| {request} | {share:g} | {slow:.2f} | {fast:.2f} | {slow / fast:.2f} | {distances} |", flush=True)


def requests(new, x, y, count):
    """Delete single samples one after another, all in one replay, and at once by the linearised training."""
    model = new().fit(x, y)
    table(f"{count} deletions", "way", "seconds", "‖U − I‖")
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:count]
    retrained = exact(model, lambda model: model.delete(some))
    print(f"| none | 0 | {away(model, retrained):.1e} |")
    for way, parts in (("one after another", some.split(1)), ("together", [some])):
        twin = copy.deepcopy(model)
        seconds, _ = timed(lambda twin=twin, parts=parts: [twin.delete(part) for part in parts])
        print(f"| {way} | {seconds:.3f} | {away(twin, retrained):.1e} |", flush=True)
    prepared, _ = timed(model.approximate, some[:1])
    seconds, (weight, bias) = timed(model.approximate, some)
    apart = torch.cat([torch.from_numpy(weight).flatten(), torch.from_numpy(bias)]) - retrained._run.weights()
    print(f"| approximate, prepared in {prepared:.2f} s | {seconds:.4f} | {apart.norm():.1e} |")


def recording(new, x, y, repeats):
    """Compare training that is recorded with the same training."""
    table("training", "", "seconds")
    run = new().fit(x, y)._run
    split, train = run.split, run.settings.train
    ways = {
        "recorded": lambda: new().fit(x, y),
        "not recorded": lambda: fit(Run.simple(new_model(run.settings, run.samples.data), split, train, augment=())),
    }
    times = [{name: timed(way)[0] for name, way in ways.items()} for _ in range(repeats)]
    for name in ways:
        print(f"| {name} | {statistics.median(each[name] for each in times):.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--set", nargs="*", default=["batch_size=500", "lr=0.5"], help="arguments of DeltaGrad")
    parser.add_argument("--rows", type=int, help="the first rows only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    values = {name: ast.literal_eval(value) for name, _, value in (each.partition("=") for each in given.set)}
    train = load_data(given.dataset).train
    x, y = train.batch(torch.arange(len(train))[: given.rows])
    for part, count in ((shares, given.repeats), (requests, given.requests), (recording, given.repeats)):
        part(lambda: DeltaGrad(**values), x, y, count)

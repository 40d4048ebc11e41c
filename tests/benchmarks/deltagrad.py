"""DeltaGrad against retraining: seconds, ratio and distance for several rates of deletion and addition.

    python tests/benchmarks/deltagrad.py --mnist parquet:path/to/mnist

Both sides compute gradients by the same function and run in turn, in one process; medians of --repeats. Reading,
checking and writing the history is DeltaGrad's to pay. ``w`` is the model before the request, ``U`` the retrained one
and ``I`` DeltaGrad's. Pixels are in [0, 1] unless --standardised.
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from raypkg.core.settings import Cluster, Model, Training
from raypkg.data import Data, load_data
from raypkg.data.split import Split
from raypkg.engine.loop import fit
from raypkg.engine.run import Run, learning_rate
from raypkg.engine.worker import threads
from raypkg.methods.deltagrad.answer import changed_steps, sharded_gradient
from raypkg.methods.deltagrad.history import History, HistoryWriter, Layout
from raypkg.methods.deltagrad.hook import Historian
from raypkg.methods.deltagrad.linearised import Linearised
from raypkg.methods.deltagrad.objective import Objective, to_vector
from raypkg.methods.deltagrad.replay import Periodic, replay, retrain
from raypkg.methods.deltagrad.run import Membership
from raypkg.methods.deltagrad.settings import ReplaySettings
from raypkg.models import build_model

COLUMNS = ("request", "rate", "retrain s", "DeltaGrad s", "ratio", "floor", "‖w − U‖", "‖U − I‖", "published")


@dataclass
class Case:
    """One row group: data, model, training and replay, and what was published for it."""

    title: str
    data: Data
    model: Model
    training: Training
    period: int
    burn_in: int
    rates: dict[float, str]


def cases(given: argparse.Namespace) -> list[Case]:
    """Return the settings of the paper and of its released example, and a table of covtype's shape."""
    logistic = Training(
        epochs=32, batch_size=16384, lr=0.1, weight_decay=0.005, schedule="constant", momentum=0, precision="float64"
    )
    covtype = Case(
        "covtype's shape (5, 10)", covtype_like(), Model(name="linear"), logistic, 5, 10, {1e-3: "2.0: 1.7e-3 → 3.6e-5"}
    )
    digits = load_data("digits")
    digits = Data(*(replace(split, mean=(0.0,), std=(1.0,)) for split in digits))
    short = logistic.model_copy(update={"epochs": 20, "batch_size": 500, "lr": 0.5})
    digits = Case("digits, batches of 500 (5, 20)", digits, Model(name="linear"), short, 5, 20, {})
    every = [*(mnist_cases(given, logistic) if given.mnist else ()), covtype, digits]
    return [case for case in every if given.only in case.title]


def mnist_cases(given: argparse.Namespace, logistic: Training) -> list[Case]:
    """Return those on MNIST."""
    mnist = load_data(given.mnist)
    if not given.standardised:
        mnist = Data(*(replace(split, mean=(0.0,), std=(1.0,)) for split in mnist))
    linear = Model(name="linear")
    mlp = Model(name="mlp", options={"hidden": [300]})
    full = logistic.model_copy(update={"batch_size": len(mnist.train)})
    readme = logistic.model_copy(
        update={"epochs": 20, "weight_decay": 1e-4, "schedule": "multistep", "milestones": (0.5,), "lr_drop": 0.5}
    )
    published = {
        5e-5: "–", 1e-3: "2.4: 4.4e-3 → 8e-5", 1e-2: "2.2: 1.4e-2 → 2.4e-4", 0.1: "1.8: 4.7e-2 → 1.1e-3",
        0.2: "1.5: 7.2e-2 → 2.0e-3",
    }  # fmt: skip
    return [
        Case("MNIST, logistic, batch 16384, 32 epochs (5, 10)", mnist, linear, logistic, 5, 10, published),
        Case("MNIST, README of the release (5, 20)", mnist, linear, readme, 5, 20, {1e-3: "2.8: 2.7e-3 → 7.2e-5"}),
        Case("MNIST, logistic, full batch (5, 10)", mnist, linear, full, 5, 10, {1e-2: "2.7: 1.3e-2 → 5.0e-5"}),
        Case("MNIST, logistic, full batch (20, 5)", mnist, linear, full, 20, 5, {1e-2: "6.4: 1.3e-2 → 1.4e-3"}),
        Case("MNIST, logistic, full batch (20, 3)", mnist, linear, full, 20, 3, {1e-2: "–"}),
        Case(
            "MNIST, MLP 784-300-10, full batch (2, 10)", mnist, mlp, full, 2, 10,
            {1e-2: "1.3: 4.6e-2 → 5e-4, (2, 100)"},
        ),
    ]  # fmt: skip


def covtype_like() -> Data:
    """Return 581,012 rows of 54 columns in 7 classes of covtype's proportions, from a seed."""
    rng = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.365, 0.488, 0.062, 0.005, 0.016, 0.030, 0.034])
    centres = torch.randn(7, 54, generator=rng)

    def split(n: int) -> Split:
        y = torch.multinomial(shares, n, replacement=True, generator=rng)
        return Split.from_tensors(centres[y] + 2 * torch.randn(n, 54, generator=rng), y)

    return Data(split(581_012), split(10_000))


class Bench:
    """One case: trains, records, and answers requests."""

    def __init__(self, case: Case, threads: int):
        self.case = case
        self.split = case.data.train
        self.objective = Objective.of(case.model, self.split)
        built = build_model(
            case.model.name, self.split.shape, self.split.num_classes, seed=0, options=case.model.options
        )
        self.initial = to_vector(built.parameters()).double()
        self.membership = Membership(torch.arange(len(self.split)), (), case.training.batch_size, 0)
        self.cluster = Cluster(workers=0, cpus_per_worker=threads)
        self.folder = Path(tempfile.mkdtemp())

    def gradient(self):
        """Hold the samples in this process until the block ends."""
        return sharded_gradient(self.objective, self.split, self.cluster)

    def batches(self, active: torch.Tensor):
        """Yield η and the samples of every batch; drawing them is part of training."""
        train = self.case.training
        for epoch in range(train.epochs):
            batches = self.membership.epoch(epoch)
            for number, batch in enumerate(batches):
                progress = (epoch + number / len(batches)) / train.epochs
                yield learning_rate(train, progress), batch[active[batch]]

    def retrain(self, active: torch.Tensor) -> torch.Tensor:
        """Train with the samples in use."""
        with self.gradient() as gradient:
            decay = self.case.training.weight_decay
            *_, w = retrain(self.batches(active), self.initial, gradient, decay=decay)
        return w

    def record(self, active: torch.Tensor) -> History:
        """Train with the samples in use and record it."""
        layout = Layout(len(self.initial), "float64")
        folder = self.folder / "recorded"
        w = self.initial
        decay = self.case.training.weight_decay
        with closing(HistoryWriter(folder, layout)) as writer, self.gradient() as gradient:
            writer.start()
            for rate, batch in self.batches(active):
                mean = gradient(w, batch) / len(batch)
                writer.append(rate, w, mean)
                w = w - rate * (mean + decay * w)
            return History(folder, layout, writer.seal(w))

    def fit(self) -> None:
        """Train with everyone in effray's loop and record it."""
        split, model = self.split, self.case.model
        built = build_model(model.name, split.shape, split.num_classes, seed=0, options=model.options)
        layout = Layout(len(self.initial), "float64")
        with closing(HistoryWriter(self.folder / "fitted", layout)) as writer, threads(self.cluster.cpus_per_worker):
            train = self.case.training
            fit(Run.simple(built.double(), split, train, hooks=[Historian(writer)], augment=()))
            writer.seal(to_vector(built.parameters()))

    def update(self, history, before, now, exact_steps=None) -> tuple[History, int]:
        """Replay with other samples; return the history of that, which ends with the weights, and the exact steps."""
        folder = self.folder / str(time.monotonic_ns())
        exact_steps = exact_steps or Periodic(self.case.period, self.case.burn_in)
        exact = 0
        with closing(HistoryWriter(folder, history.layout)) as writer, self.gradient() as gradient:
            writer.start()
            steps = changed_steps(history, self.membership, before, now)
            decay = self.case.training.weight_decay
            convex = self.objective.linear
            for step in replay(steps, gradient, exact_steps, decay=decay, convex=convex):
                writer.append(step.rate, step.w, step.gradient)
                exact += step.exact
            return History(folder, history.layout, writer.seal(step.after)), exact


def rows(bench: Bench, repeats: int):
    """Yield the table's rows of one case."""
    everyone = torch.ones(len(bench.split), dtype=torch.bool)
    for adding in (False, True):
        for rate, published in bench.case.rates.items():
            rng = torch.Generator().manual_seed(1)
            some = torch.randperm(len(everyone), generator=rng)[: max(1, round(rate * len(everyone)))]
            fewer = everyone.index_fill(0, some, False)
            before, now = (fewer, everyone) if adding else (everyone, fewer)
            history = bench.record(before)
            old = history.read(len(history)).w
            times = {"retrain": [], "update": []}
            for _ in range(repeats):
                start = time.perf_counter()
                retrained = bench.retrain(now)
                middle = time.perf_counter()
                replayed, exact = bench.update(history, before, now)
                times["retrain"].append(middle - start)
                times["update"].append(time.perf_counter() - middle)
            updated = replayed.read(len(replayed)).w
            slow, fast = (statistics.median(values) for values in times.values())
            yield (
                "add" if adding else "delete", f"{rate:g}", f"{slow:.2f}", f"{fast:.2f}", f"{slow / fast:.2f}",
                f"{len(history) / max(1, exact):.2f}", f"{(old - retrained).norm():.1e}",
                f"{(retrained - updated).norm():.1e}", published,
            )  # fmt: skip


def online(bench: Bench, requests: int) -> None:
    """Delete one sample after another, each update continuing from the last one's history, and retrain each time."""
    now = torch.ones(len(bench.split), dtype=torch.bool)
    some = torch.randperm(len(now), generator=torch.Generator().manual_seed(1))[:requests]
    history, times = bench.record(now), {"retrain": [], "update": []}
    for number, sample in enumerate(some.tolist(), 1):
        before, now = now, now.index_fill(0, torch.tensor([sample]), False)
        start = time.perf_counter()
        retrained = bench.retrain(now)
        middle = time.perf_counter()
        history, _ = bench.update(history, before, now)
        times["retrain"].append(middle - start)
        times["update"].append(time.perf_counter() - middle)
        if number % 10 == 0:
            slow, fast = (sum(values) for values in times.values())
            print(
                f"{number} deletions: retraining {slow:.1f} s, DeltaGrad {fast:.1f} s, ratio {slow / fast:.2f},"
                f" ‖U − I‖ {(history.read(len(history)).w - retrained).norm():.1e}",
                flush=True,
            )


def in_turn(ways: dict, repeats: int) -> dict:
    """Return of each way the median of its seconds of a core, and its result."""
    times = {name: [] for name in ways}
    results = {}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            results[name] = way()
            times[name].append(time.process_time() - start)
    return {name: (statistics.median(times[name]), results[name]) for name in ways}


def recording(bench: Bench, repeats: int) -> None:
    """Compare recorded training, by the gradients of a replay and by effray's loop, with training that is not."""
    everyone = torch.ones(len(bench.split), dtype=torch.bool)
    ways = {
        "not recorded": lambda: bench.retrain(everyone), "recorded": lambda: bench.record(everyone),
        "by effray's loop, as the command does": bench.fit,
    }  # fmt: skip
    print("\n| training | seconds of a core |\n|---|---|")
    for name, (seconds, _) in in_turn(ways, repeats).items():
        print(f"| {name} | {seconds:.2f} |", flush=True)


def without(bench: Bench, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return who is in use before and after the deletion of some samples, and these."""
    everyone = torch.ones(len(bench.split), dtype=torch.bool)
    some = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(1))[:count]
    return everyone, everyone.index_fill(0, some, False), some


def end(replayed: tuple[History, int]) -> torch.Tensor:
    """Return the last weights of a replay."""
    return replayed[0].read(len(replayed[0])).w


def few_steps(bench: Bench, repeats: int) -> None:
    """Compare burn-ins of a training of 20 steps: a third of them, and ended by its estimate."""
    split = replace(bench.split, y=bench.split.y[:15_000])
    rows = len(split)
    training = bench.case.training.model_copy(update={"epochs": 20, "batch_size": rows})
    small = Bench(replace(bench.case, data=Data(split, split), training=training), bench.cluster.cpus_per_worker)
    everyone, fewer, _ = without(small, rows // 1000)
    history = small.record(everyone)
    burn_in, settled = ReplaySettings().beginning(len(history))
    ways = {"retrained": lambda: small.retrain(fewer)}
    for name, chosen in {f"j0 {burn_in}": None, f"j0 {burn_in}, settled {settled}": settled}.items():
        ways[name] = lambda chosen=chosen: small.update(history, everyone, fewer, Periodic(5, burn_in, chosen))
    found = in_turn(ways, repeats)
    slow, retrained = found.pop("retrained")
    print(f"\n{rows:,} rows, 20 steps: retrained in {slow:.2f} s of a core")
    print("\n| replay | seconds | ratio | exact | ‖U − I‖ |\n|---|---|---|---|---|")
    for name, (seconds, replayed) in found.items():
        away = (end(replayed) - retrained).norm()
        print(f"| {name} | {seconds:.2f} | {slow / seconds:.2f} | {replayed[1]} | {away:.1e} |", flush=True)


def together(bench: Bench, requests: int) -> None:
    """Compare deletions of one sample each, one after another, with one replay for all."""
    everyone, fewer, some = without(bench, requests)
    recorded = bench.record(everyone)

    def one_after_another():
        replayed, now = (recorded, 0), everyone
        for sample in some:
            before, now = now, now.index_fill(0, sample, False)
            replayed = bench.update(replayed[0], before, now)
        return replayed

    ways = {"one after another": one_after_another, "together": lambda: bench.update(recorded, everyone, fewer)}
    found = in_turn(ways, 1)
    retrained = bench.retrain(fewer)
    apart = (end(found["together"][1]) - end(found["one after another"][1])).norm()
    print(f"\n| {requests} deletions, which end {apart:.1e} apart | seconds of a core | ‖U − I‖ |\n|---|---|---|")
    for name, (seconds, replayed) in found.items():
        print(f"| {name} | {seconds:.2f} | {(end(replayed) - retrained).norm():.1e} |", flush=True)


def at_once(bench: Bench, repeats: int) -> None:
    """Compare answers of the linearised training with replays."""
    history, decay = bench.record(torch.ones(len(bench.split), dtype=torch.bool)), bench.case.training.weight_decay
    start = time.process_time()
    linearised = Linearised(bench.objective, bench.split, history, torch.arange(len(bench.split)), decay)
    print(f"\nlinearised training prepared in {time.process_time() - start:.2f} s of a core")
    print("\n| deleted | ‖w − U‖ | at once: seconds, ‖U − I‖ | replay: seconds, ‖U − I‖ |\n|---|---|---|---|")
    old = history.read(len(history)).w
    for count in (1, 3, 10, 100):
        everyone, fewer, some = without(bench, count)
        retrained = bench.retrain(fewer)
        ways = {
            "at once": lambda some=some: old + linearised.change(some),
            "replay": lambda everyone=everyone, fewer=fewer: end(bench.update(history, everyone, fewer)),
        }
        found = in_turn(ways, repeats).values()
        cells = [f"{seconds:.4f}, {(w - retrained).norm():.1e}" for seconds, w in found]
        print(f"| {count} | {(old - retrained).norm():.1e} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print one table per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", help="parquet:PATH of MNIST; without it, only the made table")
    parser.add_argument("--only", default="", help="cases whose title holds this")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--standardised", action="store_true", help="pixels of mean 0 and deviation 1")
    parser.add_argument("--few-steps", action="store_true", help="also compare burn-ins of a small training")
    parser.add_argument("--together", type=int, default=0, metavar="N", help="also N deletions in one replay")
    parser.add_argument("--at-once", action="store_true", help="also answers of the linearised training")
    parser.add_argument("--online", type=int, default=0, metavar="N", help="also delete N samples one after another")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for case in cases(given):
        print(f"\n{case.title}\n\n| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
        bench = Bench(case, given.threads)
        for row in rows(bench, given.repeats):
            print("| " + " | ".join(row) + " |", flush=True)
        recording(bench, given.repeats)
        if given.few_steps:
            few_steps(bench, given.repeats)
        if given.together:
            together(bench, given.together)
        if given.at_once:
            at_once(bench, given.repeats)
        if given.online:
            online(bench, given.online)


if __name__ == "__main__":
    main()

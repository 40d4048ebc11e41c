"""A sweep's folder: the settings that its trials share, what each trial sets, and what came of all of them.

    <root>/tune/<name>/  config.toml  space.py  sweep.json  results.parquet  best.toml  plots/*.png

Its trials are run folders beside those of the experiment, ``<root>/<experiment>/<name>-<number>``.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import tomli_w

from raypkg.core.config import Settings, parse_toml, to_toml
from raypkg.core.errors import UserError, unknown
from raypkg.core.settings import APART
from raypkg.runs.compare import kendall
from raypkg.runs.folder import RunFolder, check_name
from raypkg.runs.storage import Storage

FOLDER = "tune"  # among those of the experiments
BEST, RECORD = "best.toml", "sweep.json"
DONE, STOPPED, FAILED, UNFINISHED = "done", "stopped", "failed", "unfinished"


class Metric(NamedTuple):
    """A figure of a run: which way it is better, whether every epoch has it or the end alone, and of what it is."""

    mode: str
    each_epoch: bool
    held_out: bool = False


METRICS = {
    "accuracy": Metric("max", True, held_out=True),
    "valid_loss": Metric("min", True, held_out=True),
    "train_accuracy": Metric("max", True),
    "loss": Metric("min", True),
    "test_accuracy": Metric("max", False),
    "test_loss": Metric("min", False),
    "seconds": Metric("min", False),
    "backward": Metric("min", False),  # samples back-propagated, over all phases
}


class SweepFolder:
    """One sweep's folder; only the process that runs the sweep writes to it.

    Args:
        storage: where it is.

    Raises:
        UserError: its making was cut short, or its record is not one.
    """

    def __init__(self, storage: Storage):
        self.storage = storage
        record = storage.read_json(RECORD) or {}
        if "trials" not in record or "experiment" not in record.get("order", {}):
            raise UserError(f"{storage.root} holds no whole sweep: delete the folder and start the sweep again")
        self.order: dict[str, Any] = record["order"]
        self.trials: list[dict[str, Any]] = record["trials"]

    @property
    def name(self) -> str:
        """The sweep's name: the last part of its path."""
        return self.storage.root.rpartition("/")[2]

    @property
    def root(self) -> str:
        """The root of all runs."""
        return self.storage.root.rsplit("/", 2)[0]

    @property
    def config(self) -> dict[str, Any]:
        """The settings that all trials share, not yet validated."""
        return parse_toml((self.storage.read("config.toml") or b"").decode(), f"{self.storage.root}/config.toml")

    @property
    def space(self) -> str:
        """The text of the space's file."""
        return (self.storage.read("space.py") or b"").decode()

    def run(self, number: int) -> RunFolder:
        """Return the folder of a trial's run, which may not exist yet."""
        return RunFolder(Storage(self.root) / self.order["experiment"] / self.run_name(number))

    def run_name(self, number: int) -> str:
        """Return the name of a trial's run."""
        return f"{self.name}-{number:03d}"

    def started(self, number: int, values: Mapping[str, Any]) -> None:
        """Keep a trial's settings; a searcher thinks of them only now."""
        self.trials += [{"settings": None, "ended": None, "error": None} for _ in range(len(self.trials), number + 1)]
        self.trials[number] = {"settings": dict(values), "ended": None, "error": None}
        self._write()

    def ended(self, number: int, error: str | None) -> None:
        """Keep how a trial ended."""
        state = FAILED if error else DONE if self.run(number).summary else STOPPED
        self.trials[number] |= {"ended": state, "error": error}
        self._write()

    def change(self, order: Mapping[str, Any], settings: Settings) -> None:
        """Keep what is asked for otherwise from now on."""
        self.order |= order
        self.storage.write("config.toml", to_toml(settings).encode())
        self._write()

    def waiting(self) -> list[tuple[int, dict[str, Any]]]:
        """Return number and settings of the trials that are to be run: new, unfinished or failed ones."""
        known = [(number, trial["settings"]) for number, trial in enumerate(self.trials) if trial["settings"]]
        return [(number, settings) for number, settings in known if self.state(number) in (UNFINISHED, FAILED)]

    def further(self) -> list[int]:
        """Return the numbers of the trials whose settings nobody has thought of yet."""
        gaps = [number for number, trial in enumerate(self.trials) if not trial["settings"]]
        return [*gaps, *range(len(self.trials), self.order["samples"])]

    def finals(self) -> set[int]:
        """Return the numbers of the trials on all samples that follow those on the sweep's coreset."""
        return set(range(self.order["samples"], len(self.trials))) if self.order.get("proxy") else set()

    def state(self, number: int) -> str:
        """Return how far a trial is; its run folder knows best."""
        return DONE if self.run(number).summary else self.trials[number]["ended"] or UNFINISHED

    def results(self) -> list[dict[str, Any]]:
        """Return a row for each trial: its number, run, state and figures, and what it sets."""
        return [
            {
                "trial": number,
                "run": self.run_name(number),
                "state": self.state(number),
                **({"proxy": number not in self.finals()} if self.order.get("proxy") else {}),
                "error": trial["error"],
                **measured(self.run(number)),
                **trial["settings"],
            }
            for number, trial in enumerate(self.trials)
            if trial["settings"]
        ]

    def conclude(self, results: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None) -> None:
        """Write the table of all trials and the settings of the best one."""
        names = list(dict.fromkeys(name for row in results for name in row))
        self.storage.write_table("results.parquet", pa.table({name: _column(results, name) for name in names}))
        if best:
            self.storage.write(BEST, tomli_w.dumps(self.lasting(best["trial"])).encode())

    def lasting(self, number: int) -> dict[str, Any]:
        """Return the settings of a trial that alter its result."""
        return {name: part for name, part in self.run(number).config.items() if name not in APART}

    @property
    def best(self) -> dict[str, Any] | None:
        """The settings in ``best.toml``."""
        text = self.storage.read(BEST)
        return parse_toml(text.decode(), f"{self.storage.root}/{BEST}") if text else None

    def _write(self) -> None:
        self.storage.write_json(RECORD, {"order": self.order, "trials": self.trials})


def create_sweep(
    root: str, name: str, order: Mapping[str, Any], settings: Settings, space: str, trials: Iterable[Mapping[str, Any]]
) -> SweepFolder:
    """Make a new sweep folder.

    Args:
        root: of all runs.
        name: of the sweep.
        order: what was asked for, as plain values; with ``experiment``.
        settings: that all trials share.
        space: text of the space's file.
        trials: settings of the trials that are known beforehand.

    Raises:
        UserError: a sweep of that name exists, or a run that is named as it or a trial, or the name cannot be one.
    """
    check_name(name)
    sweeps, runs = Storage(root) / FOLDER, Storage(root) / order["experiment"]
    if name in sweeps.list():
        raise UserError(f"sweep {name!r} exists in {sweeps.root}: give another --name, or go on with --resume {name}")
    if taken := [run for run in runs.list() if re.fullmatch(rf"{re.escape(name)}(-\d+)?", run)]:
        raise UserError(
            f"run {taken[0]!r} exists in {runs.root}, as the sweep or a trial would be called: give another --name"
        )
    storage = sweeps / name
    known = [{"settings": dict(values), "ended": None, "error": None} for values in trials]
    try:
        storage.write("config.toml", to_toml(settings).encode())
        storage.write("space.py", space.encode())
        storage.write_json(RECORD, {"order": dict(order), "trials": known})  # the last: now it is a sweep
    except BaseException:
        storage.delete_folder("")
        raise
    return SweepFolder(storage)


def find_sweep(root: str, name: str) -> SweepFolder:
    """Open an existing sweep.

    Raises:
        UserError: no such sweep, the nearest one named.
    """
    sweeps = Storage(root) / FOLDER
    if name not in sweeps.list():
        raise unknown(f"sweep in {sweeps.root}", name, sweeps.list())
    return SweepFolder(sweeps / name)


def is_sweep(storage: Storage) -> bool:
    """Say whether a folder is a sweep's."""
    return RECORD in storage.list()


def curve(folder: RunFolder, metric: str) -> list[tuple[int, float]]:
    """Return epoch and metric of the main training, where it was measured."""
    return [(row["epoch"], row[metric]) for row in _rows(folder) if row.get(metric) is not None]


def measured(folder: RunFolder) -> dict[str, Any]:
    """Return a run's figures: the last of every metric, and how many epochs of the main training there are."""
    last: dict[str, Any] = {"epochs": max((row["epoch"] for row in _rows(folder)), default=0)}
    for row in _rows(folder):
        last |= {name: row[name] for name in METRICS if row.get(name) is not None}
    if summary := folder.summary:
        last |= {name: summary[name] for name in METRICS if name in summary}
        last["backward"] = sum(phase["backward"] for phase in summary["phases"])
    elif "backward" in last:  # of the main training so far; what came before it is paid as well
        records = [folder.phase(name.removesuffix(".json")) or {} for name in folder.storage.list("phases")]
        last["backward"] += sum(cost["backward"] for record in records for cost in record.get("costs", ()))
    return last


def ranked(results: Iterable[Mapping[str, Any]], metric: str, mode: str) -> list[Mapping[str, Any]]:
    """Return the trials, the best and of equal ones the cheapest first: done, then stopped, then on a proxy."""

    def key(row: Mapping[str, Any]) -> tuple[int, float, int]:
        if row.get(metric) is None:
            return 4, 0.0, 0
        return (
            (row["state"] != DONE) + 2 * row.get("proxy", False),
            row[metric] * (-1 if mode == "max" else 1),
            row.get("backward", 0),
        )

    return sorted(results, key=key)


def front(results: Iterable[Mapping[str, Any]], metric: str, mode: str, cost: str = "backward") -> list[int]:
    """Return the numbers of the done trials that no other beats in both metric and cost, the cheapest first.

    >>> rows = [{"trial": n, "state": "done", "accuracy": a, "backward": b} for n, (a, b) in
    ...         enumerate([(0.8, 100), (0.9, 200), (0.7, 150), (0.9, 300)])]
    >>> front(rows, "accuracy", "max")
    [0, 1]
    """
    sign = 1 if mode == "max" else -1
    whole = [row for row in results if row["state"] == DONE and not row.get("proxy")]
    done = [row for row in whole if None not in (row.get(metric), row.get(cost))]
    found: list[int] = []
    best = float("-inf")
    for row in sorted(done, key=lambda row: (row[cost], -sign * row[metric])):
        if sign * row[metric] > best:
            best = sign * row[metric]
            found.append(row["trial"])
    return found


def judge_proxy(sweep: SweepFolder) -> dict[str, Any] | None:
    """Return how well the coreset ranked the trials that were done on all samples too, and what it cost.

    ``backward`` is what the sweep cost with the coreset's own run, ``backward_without`` what as many trials on all
    samples would have cost at the mean of those that were.
    """
    if not sweep.order.get("proxy"):
        return None
    metric, results = sweep.order["metric"], sweep.results()
    on_proxy = {_key(row, sweep): row for row in results if row.get("proxy") and row.get(metric) is not None}
    whole = [row for row in results if not row.get("proxy") and row["state"] == DONE]
    pairs = [(on_proxy[_key(row, sweep)][metric], row[metric]) for row in whole if _key(row, sweep) in on_proxy]
    if len(pairs) < 2:
        return None
    path = next(iter(sweep.order["fixed"].values()))
    select = measured(RunFolder(Storage(path.rpartition("/")[0])))["backward"]
    return {
        "trials": len(pairs),
        "kendall": kendall(*np.array(pairs).T),
        "backward": select + sum(row.get("backward", 0) for row in results),
        "backward_without": round(sweep.order["samples"] * np.mean([row["backward"] for row in whole])),
    }


def _key(row: Mapping[str, Any], sweep: SweepFolder) -> tuple[Any, ...]:
    return tuple(str(row.get(name)) for name in sweep.order["varied"])


def _rows(folder: RunFolder) -> list[dict[str, Any]]:
    return [row for row in folder.rows if row.get("main")]


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> pa.Array:
    values = [row.get(name) for row in rows]
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # values of several types, or beyond 64 bits
        return pa.array([None if value is None else str(value) for value in values])

"""A sweep's folder: the settings that its trials share, what each trial sets, and what came of all of them.

    <root>/tune/<name>/  config.toml  space.py  sweep.json  results.parquet  best.toml  plots/*.png

A comparison is a sweep whose trials come from a table, which is kept in its order; it has no space.

Its trials are run folders beside those of the experiment, ``<root>/<experiment>/<name>-<number>``.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import tomli_w

from raypkg.core.config import Settings, parse_toml, with_current_names
from raypkg.core.errors import UserError, unknown
from raypkg.core.settings import APART
from raypkg.experiments import experiment, training_settings_of
from raypkg.runs.folder import RunFolder, check_name, discard
from raypkg.runs.sealed import read_settings, write_settings
from raypkg.runs.storage import Storage

from .figures import TrialRun

FOLDER = "tune"  # among those of the experiments
BEST = "best.toml"
RECORD = "sweep.json"
SPACE = "space.py"
AFTER = "after.json"  # in the run folder of a trial: figures of what was done with the finished run
ORDERED = {"experiment": str, "metric": str, "mode": str, "samples": int}  # what every order has
COMPARED = ("asked", "scale")  # what every order of a comparison has besides
DONE = "done"
STOPPED = "stopped"
FAILED = "failed"
UNFINISHED = "unfinished"
Row = Mapping[str, Any]


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
        if not _is_record(record):
            raise UserError(
                f"{storage.root} holds no whole sweep: its {RECORD} is missing or damaged, so delete the folder and"
                " start the sweep again"
            )
        self.order: dict[str, Any] = record["order"]
        self.trials: list[dict[str, Any]] = record["trials"]
        self._rename()

    def _rename(self) -> None:
        """Give settings that an earlier version recorded their current names."""
        if self.experiment not in experiment:
            return
        current = partial(with_current_names, training_settings_of(experiment[self.experiment]))
        for trial in self.trials:
            trial["settings"] = trial["settings"] and current(trial["settings"])
        if "varied" in self.order:
            self.order["varied"] = list(current(dict.fromkeys(self.order["varied"])))

    @property
    def name(self) -> str:
        """The sweep's name: the last part of its path."""
        return self.storage.name

    @property
    def experiment(self) -> str:
        """The name of the experiment whose runs the trials are."""
        return self.order["experiment"]

    @property
    def metric(self) -> str:
        """The metric by which trials are compared."""
        return self.order["metric"]

    @property
    def mode(self) -> str:
        """Whether the metric is to be large or small: max or min."""
        return self.order["mode"]

    @property
    def table(self) -> dict[str, Any] | None:
        """The table of a comparison, as plain values; None of a sweep over a space."""
        return self.order.get("table")

    @property
    def command(self) -> str:
        """The command that began it, without options."""
        return f"effray compare {self.order['asked']}" if self.table else f"effray tune {self.experiment}"

    @property
    def root(self) -> str:
        """The root of all runs."""
        return self.storage.parent.parent.root

    @property
    def config(self) -> dict[str, Any]:
        """The settings that all trials share, not yet validated.

        Raises:
            UserError: they are missing or damaged: a sweep never goes on with others.
        """
        return read_settings(self.storage)

    @property
    def space(self) -> str:
        """The text of the space's file.

        Raises:
            UserError: it is missing, or no text.
        """
        try:
            return self._kept(SPACE).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.storage.root}/{SPACE} is corrupt: {error}") from None

    @property
    def best(self) -> dict[str, Any] | None:
        """The settings in ``best.toml``."""
        content = self.storage.read(BEST) or b""
        return parse_toml(content, f"{self.storage.root}/{BEST}") or None

    def run_name(self, number: int) -> str:
        """Return the name of a trial's run."""
        return f"{self.name}-{number:03d}"

    def run_storage(self, number: int) -> Storage:
        """Return where a trial's run is, or will be."""
        return Storage(self.root) / self.experiment / self.run_name(number)

    def run(self, number: int) -> RunFolder:
        """Open the folder of a trial's run, which may not exist yet."""
        return RunFolder(self.run_storage(number))

    def runs(self) -> dict[int, TrialRun]:
        """Read the run of every trial whose settings are known."""
        return {number: TrialRun(self.run(number)) for number in self._known()}

    def lasting(self, number: int) -> dict[str, Any]:
        """Return the settings of a trial that alter its result."""
        settings = read_settings(self.run_storage(number))
        return {name: part for name, part in settings.items() if name not in APART}

    def started(self, number: int, values: Mapping[str, Any]) -> None:
        """Keep a trial's settings; a searcher thinks of them only now."""
        while len(self.trials) <= number:
            self.trials.append(_new_trial(None))
        self.trials[number] = _new_trial(values, self.trials[number].get("after"))
        self._write()

    def ended(self, number: int, error: str | None) -> str:
        """Keep how a trial ended, and return the state that it is in."""
        if error:
            state = FAILED
        elif self._is_done(number):
            state = DONE
        else:
            state = STOPPED
        self.trials[number] |= {"ended": state, "error": error}
        self._write()
        return state

    def extend(self, trials: Iterable[tuple[Mapping[str, Any], str | None]]) -> None:
        """Add trials, each with what follows its run, if anything does."""
        self.trials += [_new_trial(values, after) for values, after in trials]
        self.order["samples"] = len(self.trials)
        self._write()

    def change(self, order: Mapping[str, Any], settings: Settings) -> None:
        """Keep what is asked for otherwise from now on."""
        self.order |= order
        write_settings(self.storage, settings)
        self._write()

    def state(self, number: int) -> str:
        """Return how far a trial is."""
        return self._state(number, self._is_done(number))

    def waiting(self) -> list[tuple[int, dict[str, Any]]]:
        """Return number and settings of the trials that are to be run: new, unfinished or failed ones."""
        known = [(number, self.trials[number]["settings"]) for number in self._known()]
        return [trial for trial in known if self.state(trial[0]) in (UNFINISHED, FAILED)]

    def further(self) -> list[int]:
        """Return the numbers of the trials whose settings nobody has thought of yet."""
        known = set(self._known())
        count = max(len(self.trials), self.order["samples"])
        return [number for number in range(count) if number not in known]

    def results(self, runs: Mapping[int, TrialRun] | None = None) -> list[dict[str, Any]]:
        """Return a row for each trial: its number, run, state and figures, and what it sets.

        Args:
            runs: of all trials, where the caller has read them.
        """
        runs = self.runs() if runs is None else runs
        return [self._result(number, run) for number, run in runs.items()]

    def conclude(self, results: Sequence[Row], best: Row | None) -> None:
        """Write the table of all trials and the settings of the best one."""
        names = dict.fromkeys(name for row in results for name in row)
        table = pa.table({name: _column(results, name) for name in names})
        self.storage.write_table("results.parquet", table)
        if best:
            settings = self.lasting(best["trial"])
            self.storage.write(BEST, tomli_w.dumps(settings).encode())

    def _kept(self, file: str) -> bytes:
        """Return a file that a sweep must have."""
        content = self.storage.read(file)
        if not (content and content.strip()):
            raise UserError(f"{self.storage.root}/{file} is missing or empty: what was asked for is lost")
        return content

    def _known(self) -> list[int]:
        """Return the numbers of the trials whose settings are known."""
        return [number for number, trial in enumerate(self.trials) if trial["settings"]]

    def _is_done(self, number: int) -> bool:
        storage = self.run_storage(number)
        if storage.read("summary.json") is None:
            return False
        return not self.trials[number].get("after") or storage.read(AFTER) is not None

    def _state(self, number: int, done: bool) -> str:
        """Return a trial's state: its run folder knows better than the record, which a killed sweep leaves behind."""
        return DONE if done else self.trials[number]["ended"] or UNFINISHED

    def _result(self, number: int, run: TrialRun) -> dict[str, Any]:
        trial = self.trials[number]
        row: dict[str, Any] = {
            "trial": number,
            "run": self.run_name(number),
            "state": self._state(number, run.summary is not None),
        }
        row["error"] = trial["error"]
        return row | run.figures() | trial["settings"]

    def _write(self) -> None:
        self.storage.write_json(RECORD, {"order": self.order, "trials": self.trials})


def create_sweep(
    root: str,
    name: str,
    order: Mapping[str, Any],
    settings: Settings,
    space: str | None,
    trials: Iterable[Mapping[str, Any]],
) -> SweepFolder:
    """Make a new sweep folder.

    Args:
        root: of all runs.
        name: of the sweep.
        order: what was asked for, as plain values; with ``experiment``.
        settings: that all trials share.
        space: text of the space's file; None where the trials come from no space.
        trials: settings of the trials that are known beforehand.

    Raises:
        UserError: a sweep of that name exists, or a run that is named as it or a trial, or the name cannot be one.
    """
    check_name(name)
    sweeps = Storage(root) / FOLDER
    runs = Storage(root) / order["experiment"]
    storage = sweeps / name
    if not storage.claim():
        raise UserError(
            f"sweep {name!r} exists in {sweeps.root}: give another --name, or continue with --resume {name}"
        )
    record = {"order": dict(order), "trials": [_new_trial(values) for values in trials]}
    try:
        _check_free(runs, name)
        write_settings(storage, settings)
        if space is not None:
            storage.write(SPACE, space.encode())
        storage.write_json(RECORD, record)  # the last: now it is a sweep
        storage.settle()
    except BaseException:
        discard(storage)
        raise
    return SweepFolder(storage)


def _check_free(runs: Storage, name: str) -> None:
    same_names = re.compile(rf"{re.escape(name)}(-\d+)?")
    if taken := next((run for run in runs.list() if same_names.fullmatch(run)), None):
        raise UserError(
            f"run {taken!r} exists in {runs.root}, as the sweep or a trial would be called: give another --name"
        )


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


def _is_record(record: Any) -> bool:
    """Say whether a value can be the record of a sweep."""
    if not isinstance(record, dict):
        return False
    order = record.get("order")
    trials = record.get("trials")
    if not (isinstance(order, dict) and isinstance(trials, list)):
        return False
    ordered = all(isinstance(order.get(name), kind) for name, kind in ORDERED.items())
    table = order.get("table")
    if table is not None:
        ordered = ordered and isinstance(table, dict) and all(isinstance(order.get(name), str) for name in COMPARED)
    return ordered and all(map(_is_trial, trials))


def _is_trial(trial: Any) -> bool:
    if not isinstance(trial, dict) or not trial.keys() >= {"settings", "ended", "error"}:
        return False
    return trial["settings"] is None or isinstance(trial["settings"], dict)


def _new_trial(values: Mapping[str, Any] | None, after: str | None = None) -> dict[str, Any]:
    settings = None if values is None else dict(values)
    trial: dict[str, Any] = {"settings": settings, "ended": None, "error": None}
    return trial | {"after": after} if after else trial


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> pa.Array:
    values = [row.get(name) for row in rows]
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # values of several types, or beyond 64 bits
        texts = [None if value is None else str(value) for value in values]
        return pa.array(texts)

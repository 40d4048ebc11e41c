"""A study: numbered trials with settings, results and a page.

    <root>/tune/<name>/  config.toml  sweep.json  space.py
                         results.parquet  best.toml  table.md  report.html  plots/*.png

``effray tune`` draws the trials from a space, whose file the folder keeps with the best settings; ``effray compare``
takes them from a table, which the record keeps. A trial is a run, ``<root>/<experiment>/<name>-<number>``.
"""

import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from raypkg.core.config import Settings, first_problem, stored_values, with_current_names
from raypkg.core.errors import UserError, unknown
from raypkg.core.settings import APART
from raypkg.experiments import experiment, training_settings_of
from raypkg.runs.catalog import DONE as FINISHED
from raypkg.runs.catalog import RECORD, Listed, is_study, named, state_of, unreadable
from raypkg.runs.folder import RunFolder, check_name, read_settings, write_settings
from raypkg.runs.storage import PART, Storage

from .figures import AFTER, DONE, Row, TrialRun, ranked
from .tables import ExperimentName, MetricName, current_function, identity

FOLDER = "tune"  # beside the folders of the experiments
SPACE = "space.py"
RESULTS = "results.parquet"
STOPPED = "stopped"
FAILED = "failed"
UNFINISHED = "unfinished"
TO_THE_END = "fifo"  # the scheduler that stops no trial
TRIAL = re.compile(r"(.+)-(\d{3,})")  # a trial's name: its study's name and its number
Values = dict[str, Any]  # settings of a trial by dotted names


class Order(BaseModel):
    """The request that began a study; options that a command no longer has are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)

    experiment: ExperimentName
    metric: MetricName
    mode: Literal["max", "min"]
    samples: int = Field(ge=0)  # trials in all; a comparison has those of its record
    space: str | None = None
    scheduler: str = TO_THE_END
    search: Literal["random", "grid", "optuna"] | None = None
    concurrent: int | None = Field(None, ge=1)  # trials at once; None = as many as fit
    time_budget: float | None = None  # seconds
    varied: list[str] = []  # names of the settings that trials draw from the space
    asked: str | None = None  # name or path of a comparison's table
    scale: str | None = None  # of the table
    table: dict[str, Any] | None = None  # with the rows, cases and seeds requested so far


class Trial(BaseModel):
    """The record of a trial."""

    model_config = ConfigDict(strict=True)

    settings: Values | None  # None until a searcher has proposed them
    ended: Literal["done", "stopped", "failed"] | None = None  # the state in which it last ended
    error: str | None = None
    after: str | None = None  # the function that follows the run
    digest: str | None = None  # of its samples

    @field_validator("after")
    @classmethod
    def _follow_renaming(cls, after: str | None) -> str | None:
        return after and current_function(after)


class Record(BaseModel):
    """The file that makes a folder a study."""

    order: Order
    trials: list[Trial]
    digest: str | None = None  # of both; earlier versions stored none

    @model_validator(mode="before")
    @classmethod
    def _check_digest(cls, stored: Any) -> Any:
        if isinstance(stored, dict) and stored.get("digest") not in (None, cls.digest_of(stored)):
            raise ValueError("its digest is another, so it has been changed")
        return stored

    @model_validator(mode="after")
    def _check_trials(self) -> Self:
        seeds = [(trial.settings or {}).get("seed") for trial in self.trials]
        if self.order.table and not all(isinstance(seed, int) for seed in seeds):
            raise ValueError("a trial of the comparison has no seed")
        if not self.order.table and self.order.search != "optuna" and len(self.trials) < self.order.samples:
            raise ValueError(f"it has {len(self.trials)} of {self.order.samples} trials")
        return self

    @staticmethod
    def digest_of(stored: Values) -> str:
        """Return the digest of the order and trials of a stored record."""
        text = json.dumps([stored.get("order"), stored.get("trials")])
        return blake2b(text.encode(), digest_size=16).hexdigest()

    @classmethod
    def write(cls, storage: Storage, order: Order, trials: Sequence[Trial]) -> None:
        """Write the record of a study with its digest."""
        record = cls.model_construct(order=order, trials=list(trials)).model_dump()
        storage.write_json(RECORD, record | {"digest": cls.digest_of(record)})


class Study:
    """The folder of a study; only the process that runs the study writes to it. A damaged record is refused."""

    def __init__(self, storage: Storage):
        self.storage = storage
        try:
            record = Record.model_validate(storage.read_json(RECORD) or {})
        except (ValidationError, UserError) as error:
            reason = first_problem(error) if isinstance(error, ValidationError) else error
            problem = f"{storage.root} holds no whole sweep: its {RECORD} is missing or damaged ({reason})"
            raise UserError(f"{problem}, so delete the folder and start the sweep again") from None
        self.name = storage.name
        self.experiment = record.order.experiment
        self.root = storage.parent.parent.root  # of all runs
        self._schema = training_settings_of(experiment[self.experiment])
        varied = [*with_current_names(self._schema, dict.fromkeys(record.order.varied))]
        self.order = record.order.model_copy(update={"varied": varied})
        self.trials = record.trials
        for trial in self.trials:
            trial.settings = trial.settings and with_current_names(self._schema, trial.settings)

    @property
    def command(self) -> str:
        """The command that began it, without options."""
        return f"effray compare {self.order.asked}" if self.order.table else f"effray tune {self.experiment}"

    @property
    def config(self) -> dict[str, Any]:
        """The settings that all trials share, not yet validated; reading raises ``UserError`` if they are missing."""
        return stored_values(self._schema, read_settings(self.storage))

    def run_name(self, number: int) -> str:
        """Return the name of a trial's run."""
        return f"{self.name}-{number:03d}"

    def run_storage(self, number: int) -> Storage:
        """Return the place of a trial's run, which may not exist yet."""
        return Storage(self.root) / self.experiment / self.run_name(number)

    def run(self, number: int) -> RunFolder:
        """Open the folder of a trial's run, which may not exist yet."""
        return RunFolder(self.run_storage(number))

    def runs(self) -> dict[int, TrialRun]:
        """Read the run of every trial whose settings are known."""
        return {number: TrialRun(self.run(number)) for number, _ in self.known()}

    def lasting(self, number: int) -> dict[str, Any]:
        """Return those settings of a trial's run that affect its result."""
        settings = read_settings(self.run_storage(number))
        return {name: part for name, part in settings.items() if name not in APART}

    # Trials

    def known(self) -> list[tuple[int, Values]]:
        """Return number and settings of the trials whose settings are known."""
        return [(number, trial.settings) for number, trial in enumerate(self.trials) if trial.settings]

    def state(self, number: int) -> str:
        """Return a trial's state: its run folder outweighs the record, which kills and deletions leave behind."""
        if self._is_done(number):
            return DONE
        ended = self.trials[number].ended
        was_deleted = ended == STOPPED and not self.run_storage(number).list()
        return UNFINISHED if ended in (None, DONE) or was_deleted else ended

    def _is_done(self, number: int) -> bool:
        storage = self.run_storage(number)
        if storage.read("summary.json") is None:
            return False
        return not self.trials[number].after or storage.read(AFTER) is not None

    def waiting(self) -> list[tuple[int, Values]]:
        """Return number and settings of the trials to run: new, unfinished and failed ones."""
        return [trial for trial in self.known() if self.state(trial[0]) in (UNFINISHED, FAILED)]

    def further(self) -> list[int]:
        """Return the numbers of the trials without settings, for a searcher to propose."""
        count = max(len(self.trials), self.order.samples)
        return [n for n in range(count) if n >= len(self.trials) or not self.trials[n].settings]

    def numbers(self) -> dict[str, int]:
        """Return the numbers of the known trials by their identity; see ``tables.identity``."""
        return {identity(settings, self.trials[number].after): number for number, settings in self.known()}

    def left(self) -> int:
        """Return the number of trials still to run."""
        return len(self.waiting()) + len(self.further())

    def started(self, number: int, values: Mapping[str, Any]) -> None:
        """Record a trial's settings, which a searcher may have proposed just now."""
        while len(self.trials) <= number:
            self.trials.append(Trial(settings=None))
        begun = {"settings": dict(values), "ended": None, "error": None}
        self.trials[number] = self.trials[number].model_copy(update=begun)
        self._write()

    def ended(self, number: int, error: str | None) -> str:
        """Record how a trial ended, and return its state; a process may die after its run was done."""
        if self._is_done(number):
            state, error = DONE, None
        else:
            state = FAILED if error else STOPPED
        self.trials[number] = self.trials[number].model_copy(update={"ended": state, "error": error})
        self._write()
        return state

    def settle(self) -> None:
        """Record the end of trials whose runs were done when the process that records it died."""
        for number, trial in enumerate(self.trials):
            if trial.ended != DONE and self._is_done(number):
                self.ended(number, None)

    def extend(self, trials: Iterable[Trial]) -> None:
        """Append trials."""
        self.trials += trials
        self.order = self.order.model_copy(update={"samples": len(self.trials)})
        self._write()

    def change(self, settings: Settings, **order: Any) -> None:
        """Record other shared settings, and changes of the order."""
        self.order = self.order.model_copy(update=order)
        write_settings(self.storage, settings)
        self._write()

    def _write(self) -> None:
        Record.write(self.storage, self.order, self.trials)

    # Results

    def row(self, number: int, run: TrialRun) -> dict[str, Any]:
        """Return number, run, state, error and figures of a trial."""
        state, error = self.state(number), self.trials[number].error
        return {"trial": number, "run": self.run_name(number), "state": state, "error": error} | run.figures()

    def results(self, runs: Mapping[int, TrialRun]) -> list[dict[str, Any]]:
        """Return a row for each trial: its number, run, state, error, figures and settings."""
        return [self.row(number, run) | (self.trials[number].settings or {}) for number, run in runs.items()]


def as_table(results: Sequence[Row]) -> pa.Table:
    """Return the results of trials as a table with a column for each figure that one of them has."""
    columns = {}
    for name in dict.fromkeys(name for row in results for name in row):
        values = [row.get(name) for row in results]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # several types, or more than 64 bits
            columns[name] = pa.array([None if value is None else str(value) for value in values])
    return pa.table(columns)


def create_study(
    root: str, name: str, order: Order, settings: Settings, space: str | None, trials: Iterable[Trial]
) -> Study:
    """Make a new study's folder, with the shared settings, a space's text and the trials known beforehand.

    A name that a study or a run of the experiment has is refused. A local folder appears with all of its files: it is
    written under another name, then renamed. On an object store the record comes last, which makes it a study.
    """
    check_name(name)
    studies = Storage(root) / FOLDER
    runs = Storage(root) / order.experiment
    storage = studies / name
    advice = f"give another --name, or continue with --resume {name}"
    exists = UserError(f"sweep {name!r} exists in {studies.root}: {advice}")
    new = studies / f"{name}.{uuid.uuid4().hex}{PART}" if storage.local else storage
    if storage.taken or not new.claim():
        raise exists
    try:
        same_names = re.compile(rf"{re.escape(name)}(-\d+)?")
        if taken := next((run for run in runs.list() if same_names.fullmatch(run)), None):
            place = f"run {taken!r} exists in {runs.root}"
            raise UserError(f"{place}, as the sweep or a trial would be called: give another --name")
        write_settings(new, settings)
        if space is not None:
            new.write(SPACE, space.encode())
        Record.write(new, order, [*trials])
        new.settle()
        if new.local and storage.local:
            try:
                new.local.rename(storage.local)
            except OSError:  # another process was faster
                raise exists from None
    except BaseException:
        new.delete_folder()
        raise
    return Study(storage)


def find_study(root: str, name: str) -> Study:
    """Open an existing study; raise ``UserError`` for an unknown name."""
    studies = Storage(root) / FOLDER
    if name not in studies.list():
        raise unknown(f"sweep in {studies.root}", name, studies.list())
    return Study(studies / name)


def study_around(run: Storage) -> Study | None:
    """Return the study that a trial belongs to, or None; raise ``UserError`` if its record is damaged."""
    match = TRIAL.fullmatch(run.name)
    if match is None:
        return None
    experiment = run.parent
    storage = experiment.parent / FOLDER / match[1]
    if not is_study(storage):
        return None
    study = Study(storage)
    is_trial = study.experiment == experiment.name and int(match[2]) < len(study.trials)
    return study if is_trial else None


# `effray list` and `effray rm`


def folded(root: str, lines: Sequence[Listed]) -> list[Listed]:
    """Replace the lines of trials by a line for each study: accuracy of the best trial, cost of all.

    Seconds are those of finished trials, as one that was stopped early has no bill of them.
    """
    runs = {(line.experiment, line.name): line for line in lines}
    studies = Storage(root) / FOLDER
    try:
        names, folds = studies.list(), []
    except UserError:
        names, folds = [], [unreadable(studies)]
    for name in names:
        folder, time = studies / name, None
        try:
            if not is_study(folder):
                continue
            time = max(folder.times().values(), default=0.0)
            study = Study(folder)
            config = study.config
            table = study.storage.read_table(RESULTS)
            state = state_of(study.storage) if study.left() else FINISHED
        except UserError:
            bad = Listed(FOLDER, name, f"bad {RECORD}", "–", "–", FOLDER, None, None, None, time or 0.0)
            folds.append(unreadable(folder) if time is None else bad)
            continue
        places = [(study.experiment, study.run_name(number)) for number in range(len(study.trials))]
        trials = {place[1]: runs.pop(place) for place in places if place in runs}
        done = [trial for trial in trials.values() if trial.state == FINISHED]
        metric = study.order.metric
        rows = {row["run"]: row for row in ([] if table is None else table.to_pylist()) if row["run"] in trials}
        measured = [rows[trial.name] for trial in done if rows.get(trial.name, {}).get(metric) is not None]
        backward = [trial.backward or rows.get(name, {}).get("backward") or 0 for name, trial in trials.items()]
        best = str(ranked(measured, metric, study.order.mode)[0]["run"]) if measured else ""
        title = f"{name}: {len(done)} of {max(len(study.trials), study.order.samples)} trials done"
        line = Listed(
            experiment=study.experiment,
            name=f"{title}, best {best}" if best else title,
            state=state,
            data=named(config, "dataset"),
            model=named(config, "model"),
            method=f"{FOLDER} {study.experiment}",
            accuracy=trials[best].accuracy if best in trials else None,
            backward=sum(backward) or None,
            seconds=sum(trial.seconds or 0 for trial in done) if done else None,
            time=max([time, *(trial.time for trial in trials.values())]),
        )
        folds.append(line)
    return [*runs.values(), *folds]


def with_studies(chosen: Sequence[Storage], trials: bool) -> tuple[list[Storage], list[Storage]]:
    """Return the folders to delete for chosen runs and studies, and the folders to lock while deleting.

    Only with ``trials`` may a trial be chosen, and are the trials of chosen studies deleted too.
    """
    folders: dict[str, Storage] = {}  # by path: each once
    around: dict[str, Storage] = {}
    for storage in chosen:
        folders[storage.root] = storage
        if is_study(storage):
            if not trials:
                continue
            try:
                study = Study(storage)
            except UserError:  # the damaged record names no trials
                continue
            runs = Storage(study.root) / study.experiment
            existing = set(runs.list())
            for number in range(len(study.trials)):
                run = runs / study.run_name(number)
                if run.name in existing:
                    folders[run.root] = run
        elif of := study_around(storage):
            if not trials:
                advice = f"--trials deletes it all the same, and `effray rm {of.name} --trials` the whole sweep"
                raise UserError(f"{storage.name} is a trial of sweep {of.name!r}, which would run it again: {advice}")
            around[of.storage.root] = of.storage
    return [*folders.values()], [*(folders | around).values()]

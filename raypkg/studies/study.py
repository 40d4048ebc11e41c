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
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from raypkg.core.config import Settings, first_problem, stored_values, with_current_names
from raypkg.core.errors import UserError, unknown
from raypkg.core.settings import APART
from raypkg.experiments import experiment, training_settings_of
from raypkg.runs.catalog import RECORD, is_study
from raypkg.runs.folder import RunFolder, check_name, read_settings, write_settings
from raypkg.runs.storage import PART, Storage

from .tables import COSTS, MAXIMA, METRICS, ExperimentName, FunctionName, MetricName, identity

AFTER = "after.json"  # in a trial's run folder: figures of the function that followed the finished run
EVALUATE = "evaluate"  # the part of a phase that measures, which is no cost of the method
FOLDER = "tune"  # beside the folders of the experiments
SPACE = "space.py"
RESULTS = "results.parquet"
DONE = "done"
STOPPED = "stopped"
FAILED = "failed"
UNFINISHED = "unfinished"
TO_THE_END = "fifo"  # the scheduler that stops no trial
TRIAL = re.compile(r"(.+)-(\d{3,})")  # a trial's name: its study's name and its number
Row = Mapping[str, Any]  # number, run, state, figures and settings of a trial
Values = dict[str, Any]  # settings of a trial by dotted names
# Records of earlier versions may have "none".
SchedulerName = Annotated[str, AfterValidator(lambda name: TO_THE_END if name == "none" else name)]


class TrialRun:
    """The run folder of a trial, read once; the run may not exist yet."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.rows = [row for row in folder.rows if row.get("main")]  # metrics of the main training
        self.epochs: int = max((row["epoch"] for row in self.rows), default=0)  # of it, so far
        self.summary = folder.summary  # the manifest of a finished run, or None

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Return epochs and a metric, where it was measured."""
        return [(row["epoch"], row[metric]) for row in self.rows if row.get(metric) is not None]

    def backward_curve(self, metric: str) -> list[tuple[float, float]]:
        """Return samples back-propagated over all phases so far and a metric; nothing for an unfinished run."""
        rows = [row for row in self.rows if row.get(metric) is not None and row.get("backward") is not None]
        if not (rows and self.summary):
            return []
        before = bill(self.summary)["backward"] - self.rows[-1]["backward"]
        return [(before + row["backward"], row[metric]) for row in rows]

    def figures(self) -> dict[str, Any]:
        """Return the last value of every metric, and the epochs of the main training."""
        last: dict[str, Any] = {"epochs": self.epochs}
        for values in (*self.rows, self.summary or {}):
            last |= {name: values[name] for name in METRICS if values.get(name) is not None}
        if self.summary:
            last["backward"] = sum(phase["backward"] for phase in self.summary["phases"])
        elif "backward" in last:
            # Until there is a manifest with the whole bill, rows have the cost of the main training, and the records of
            # finished phases that of what came before. The main training may have a record as well.
            for file in self.folder.storage.list("phases"):
                record = self.folder.phase(file.removesuffix(".json")) or {}
                if not record.get("main"):
                    last["backward"] += sum(cost["backward"] for cost in record.get("costs", ()))
        return last


def bill(summary: Mapping[str, Any], phase: str | None = None) -> dict[str, float]:
    """Return the cost of a run or of one of its phases, without evaluations.

    ``work`` is (forward + 2 · backward) / 3 samples: a backward pass counts as two forward passes.
    """
    parts = []
    for part in summary["phases"]:
        name, _, rest = part["phase"].partition(": ")
        if EVALUATE not in (name, rest) and phase in (None, name):
            parts.append(part)
    total: dict[str, float] = {}
    for name in COSTS[:-1]:
        values = [part.get(name, 0) for part in parts]
        total[name] = max(values, default=0) if name in MAXIMA else sum(values)
    return total | {"work": (total["forward"] + 2 * total["backward"]) / 3}


class Order(BaseModel):
    """The request that began a study; options that a command no longer has are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)

    experiment: ExperimentName
    metric: MetricName
    mode: Literal["max", "min"]
    samples: int = Field(ge=0)  # trials in all; a comparison has those of its record
    space: str | None = None
    scheduler: SchedulerName = TO_THE_END
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
    after: FunctionName | None = None  # follows the run
    digest: str | None = None  # of its samples


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
        trial = self.trials[number]
        trial.settings, trial.ended, trial.error = dict(values), None, None
        self._write()

    def ended(self, number: int, error: str | None) -> str:
        """Record how a trial ended, and return its state; a process may die after its run was done."""
        trial = self.trials[number]
        is_done = self._is_done(number)
        trial.ended = "done" if is_done else "failed" if error else "stopped"
        trial.error = None if is_done else error
        self._write()
        return trial.ended

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


def ranked(results: Iterable[Row], metric: str, mode: str) -> list[Row]:
    """Return trials from best to worst, of equal ones the cheapest first; done trials precede all others."""
    sign = -1 if mode == "max" else 1

    def key(row: Row) -> tuple[int, float, int]:
        if row.get(metric) is None:
            return 2, 0.0, 0
        return int(row["state"] != DONE), sign * row[metric], row.get("backward", 0)

    return sorted(results, key=key)


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

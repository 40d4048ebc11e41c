"""Tables of comparisons, and the Python files of tables and of tune spaces."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from inspect import iscoroutine
from itertools import product
from pathlib import Path
from traceback import format_exception_only, walk_tb
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

import raypkg
from raypkg.core.config import Settings, one_line, regular, validate, with_current_names
from raypkg.core.errors import UserError, shown, unknown
from raypkg.core.presets import PUBLISHED, preset_of_row, presets_of
from raypkg.experiments import experiment, training_settings_of

SUFFIX = ".py"
TABLES = "tune_spaces/tables"
SCALES = ("small", "paper")
VERDICTS = PAID, NOT_PAID, UNKNOWN = "paid", "did not pay", "unknown"  # on a row; see `outcomes.judge`
MOST_TRIALS = 10_000  # of a study, and values of a setting: each is checked beforehand
REST = "all"  # the one case of a table without cases
Values = Mapping[str, Any]  # settings by dotted names


class Metric(NamedTuple):
    """A figure by which trials are compared."""

    mode: Literal["max", "min"]
    each_epoch: bool  # measured at epochs, not only at the end of a run
    held_out: bool = False  # measured on held-out samples


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
MAXIMA = ("memory", "device_memory")  # figures of a bill that are not added up
COSTS = ("forward", "backward", "seconds", "total_seconds", "waited", *MAXIMA, "work")  # of a bill
COMPUTED = ("spearman", "overlap", "noise_auc", "critical_path")  # columns that `outcomes.column_figure` computes
LISTED, NEAREST = 8, 4  # labels that an error lists: all of so few, otherwise the nearest
SIMILAR = 0.8  # a column's name is taken for a mistyped one from this similarity on


def _one_of(kind: str, allowed: Container[str], listed: Iterable[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in allowed:
            raise unknown(kind, name, listed)
        return name

    return AfterValidator(check)


def current_function(after: str) -> str:
    """Return the current name of a function; stored comparisons may have an earlier one."""
    return re.sub(r"^raypkg\.(sweeps|studies)\.deletions:", "raypkg.methods.deltagrad.experiment:", after)


MetricName = Annotated[str, _one_of("metric", METRICS, METRICS)]
ExperimentName = Annotated[str, _one_of("experiment", experiment, experiment.names)]
# Settings by dotted names, as JSON stores them: the record of a trial is equal to them
Stored = Annotated[dict[str, Any], BeforeValidator(lambda values: json.loads(json.dumps(values)))]
FunctionName = Annotated[str, AfterValidator(current_function)]
Seed = Annotated[int, Field(strict=True, ge=0)]


# Files


def shipped_files(folder: str) -> dict[str, Path]:
    """Return the Python files in a folder of that name by their names; those of the working folder win."""
    package = Path(raypkg.__file__).parent
    files: dict[str, Path] = {}
    # Later ones win: of a clone, of an installed package, of the working folder.
    for parent in (package.parent, package, Path()):
        for file in sorted(parent.glob(f"{folder}/*{SUFFIX}")):
            files[file.stem] = file
    return files


def read_code(kind: str, name: str, folder: str) -> tuple[str, str]:
    """Return text and path of a table's or space's file, by a path that ends in .py or the name of a shipped file."""
    file = Path(name)
    if not name.endswith(SUFFIX):
        files = shipped_files(folder)
        if name not in files:
            raise unknown(kind, name, files)
        file = files[name]
    try:
        return regular(file).read_text(), str(file)
    except FileNotFoundError:
        raise UserError(f"there is no {kind} file {name!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the {kind} {str(file)!r}: {getattr(error, 'strerror', error)}") from None


def run_code(kind: str, text: str, origin: str, needed: Mapping[str, str], *arguments: Any) -> tuple[Any, ...]:
    """Run a user's file, and return the needed names that it defines, the first called with the arguments.

    ``needed`` maps the names to how errors show them. Code that raises is refused, and so is a missing name.
    """
    content: dict[str, Any] = {"__name__": kind, "__file__": origin}
    try:
        exec(compile(text, origin, "exec"), content)
        function, *others = (content.get(name) for name in needed)
        result = function(*arguments) if needed.keys() <= content.keys() else None  # type: ignore[misc]
        if iscoroutine(result):  # of an async function: Python would warn of one that is not closed
            result.close()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == origin]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [0])[-1]
        problem = f"raises {format_exception_only(error)[-1]}"
        if isinstance(error, ValidationError) and error.title == Table.__name__:
            error = one_line(Table, error)
        if isinstance(error, UserError):
            problem = str(error)
        raise UserError(f"{kind} {origin!r}{f', line {line}' * bool(line)}: {problem}") from None
    if missing := next((name for name in needed if name not in content), None):
        raise UserError(f"{kind} {origin!r} defines no {needed[missing]}")
    return result, *others


# Tables


class Table(Settings):
    """Rows of settings, each run in every case from every seed, and compared with a baseline.

    The settings of a trial are the shared ones, those of its case and those of its row; later ones win. A row is
    compared with the baseline of the same case and seed. A table that contradicts itself is refused.
    """

    title: str
    experiment: ExperimentName  # runs the trials
    baseline: str  # label of the row that the others are compared with
    rows: dict[str, Stored] = Field(min_length=1)  # settings by label
    cases: dict[str, Stored] = Field({REST: {}}, min_length=1)  # settings by label
    shared: Stored = Field({})  # settings of all rows, which options on the command line override
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, max_length=MOST_TRIALS)
    metric: MetricName = "test_accuracy"  # the compared figure, known at the end of a run
    # Values of metrics that every epoch has, such as {"accuracy": [0.9]}: the table reports the cost of reaching them.
    goals: dict[MetricName, tuple[float, ...]] = Field({})
    columns: dict[str, str] = Field({})  # further figures by heading; see `outcomes.column_figure`
    # Published figures as printed: case → row → figure. Shown while no option changes the settings of the table.
    paper: dict[str, dict[str, str | int | float]] = Field({})
    # Row → package.module:function, called with the finished run; its result, figures by name, is stored.
    after: dict[str, FunctionName] = Field({})
    # Labels of rows that are the baseline with other amounts of training: verdicts are at equal total work.
    as_baseline: tuple[str, ...] = ()
    # A figure whose excess over 1 is the gain, such as a speed-up: verdicts are on it, not on the metric.
    gain: str | None = None
    rates: tuple[float, ...] = ()  # learning rates, of which each row and case takes the best by held-out accuracy
    reference: str | None = None  # row whose scores and picks columns compare with (default: the baseline)

    def trial(self, case: str, row: str, seed: int, rate: float | None = None) -> dict[str, Any]:
        """Return the settings of a trial beyond the shared ones; a row's own rate has priority."""
        chosen = {} if rate is None else {"train.lr": rate}
        return {**self.cases[case], **chosen, **self.rows[row], "seed": seed}

    def places(self) -> Iterator[tuple[str, str, int, float | None]]:
        """Yield case, row, seed and rate of every trial, seed by seed: an interrupted comparison has most rows."""
        for seed, case, row, rate in product(self.seeds, self.cases, self.rows, self.rates or (None,)):
            yield case, row, seed, rate

    def identity(self, case: str, row: str, seed: int, rate: float | None = None) -> str:
        """Return a text that is equal for trials that are the same run."""
        return identity(self.trial(case, row, seed, rate), self.after.get(row))

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what contradicts itself; settings are checked with those of the user."""
        for label in (*self.rows, *self.cases):
            if not (label.strip() and label.isprintable()) or "," in label:
                raise UserError(f"{shown(label)} is no label: a text without commas is needed")
        named = {"baseline": [self.baseline], "after": self.after, "as_baseline": self.as_baseline}
        named["reference"] = [self.reference or self.baseline]
        for part, rows in named.items():
            if lost := next((row for row in rows if row not in self.rows), None):
                raise UserError(f"{part}: {unknown('row', lost, self.rows)}")
        for values in (self.shared, *self.rows.values(), *self.cases.values()):
            if "seed" in values:
                raise UserError(f"seed = {shown(values['seed'])} in a row or case would do nothing: see seeds")
        if short := next((metric for metric in self.goals if not METRICS[metric].each_epoch), None):
            raise UserError(f"goals: {short} is known only at the end of a run, so no goal can be reached before")
        for name in (*self.columns.values(), *filter(None, [self.gain])):
            row, slash, cost = name.rpartition(" / ")  # of another row's bill
            if row and row not in self.rows:
                raise unknown("row", row, self.rows)
            if "." in cost and not self.after:  # of a phase; functions that follow give other figures
                slash, cost = ".", cost.rpartition(".")[2]
            if slash and cost not in COSTS:
                raise unknown("cost", cost, COSTS)
            known = [*METRICS, *COMPUTED]  # methods give others, so a mistyped one alone is refused
            if not self.after and name not in known and get_close_matches(name, known, cutoff=SIMILAR):
                raise unknown("figure", name, known)
        trials = len(self.rows) * len(self.cases) * len(self.seeds) * max(1, len(self.rates))
        if trials > MOST_TRIALS:
            raise UserError(f"{trials:,} trials: at most {MOST_TRIALS:,}")
        return self

    def changed(self, **changes: Any) -> Table:
        """Return the table with other values of some fields."""
        return validate(Table, dict(self) | changes)


def stored_table(record: Mapping[str, Any]) -> Table:
    """Return the table in a study's record; raise ``UserError`` if it holds none."""
    try:
        table = validate(Table, {name: value for name, value in record.items() if name in Table.model_fields})
    except UserError as error:
        raise UserError(f"the table of this comparison: {error}") from None
    current = partial(with_current_names, training_settings_of(experiment[table.experiment]))
    return table.changed(
        shared=current(table.shared),
        rows={label: current(values) for label, values in table.rows.items()},
        cases={label: current(values) for label, values in table.cases.items()},
    )


def identity(values: Values, after: str | None) -> str:
    """Return a text that is equal for trials with equal settings and the same following function."""
    return json.dumps([dict(values), after], sort_keys=True)


def open_table(name: str, scale: str = SCALES[0]) -> Table:
    """Read a table by its name in ``tune_spaces/tables`` or its path, at the small scale or that of the paper."""
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    return read_table(*read_code("table", name, TABLES), scale)


def read_table(text: str, origin: str, scale: str) -> Table:
    """Run a table's file, whose function ``table`` returns a ``Table``; refuse one that contradicts itself."""
    (table,) = run_code("table", text, origin, {"table": "function table(scale)"}, scale)
    if not isinstance(table, Table):
        raise UserError(f"table {origin!r}: table({scale!r}) returned {shown(table)}, not a {__name__}.Table")
    schema = training_settings_of(experiment[table.experiment])
    if published := presets_of(schema).get(PUBLISHED):
        stated = {label: published.stated(str(case.get("dataset.name", ""))) for label, case in table.cases.items()}
        table = table.changed(cases={label: {**stated[label], **case} for label, case in table.cases.items()})
    shared = dict(table.shared)
    for case in table.cases.values():
        shared |= case
    presets = {label: preset_of_row(schema, row, shared) for label, row in table.rows.items() if "preset" in row}
    return table.changed(rows={**table.rows, **presets})  # trials store the settings of the presets


def with_data(table: Table, values: Values) -> Table:
    """Return a table whose cases leave their one data set to the options; refuse options for cases with several."""
    sets = {case.get("dataset.name") for case in table.cases.values()}
    if not values.keys() & {"dataset", "dataset.name"} or sets == {None}:
        return table
    if len(sets) > 1:
        raise UserError(
            f"dataset: the cases are of {', '.join(map(str, sorted(sets, key=str)))}: choose some by --cases"
        )
    own = ("dataset.name", "dataset.options.")
    cases = {}
    for label, case in table.cases.items():
        cases[label] = {name: value for name, value in case.items() if not name.startswith(own)}
    return table.changed(cases=cases)


def narrowed(
    table: Table, rows: Iterable[str] | None, cases: Iterable[str] | None, seeds: Sequence[int] | None
) -> Table:
    """Return a table with some of its rows, always the baseline's among them, some cases and other seeds.

    Rows and cases are labels or patterns such as ``crest*``; each must match a label. None = all.
    """

    def matching(kind: str, patterns: Iterable[str] | None, labels: Sequence[str]) -> set[str]:
        chosen: set[str] = set(labels) if patterns is None else set()
        for pattern in patterns or ():
            found = {label for label in labels if label == pattern or fnmatchcase(label, pattern)}
            if not found and len(labels) > LISTED:
                nearest = ", ".join(map(repr, get_close_matches(pattern, labels, NEAREST, cutoff=0.0)))
                problem = f"unknown {kind} {pattern!r}, of {len(labels)} the nearest are {nearest}"
                raise UserError(f"{problem}; --help lists all, and a pattern such as 'a*' chooses several")
            if not found:
                raise unknown(kind, pattern, labels)
            chosen |= found
        return chosen

    divided = {name.rpartition(" / ")[0] or table.baseline for name in table.columns.values()}
    needed = {table.baseline, *table.as_baseline, table.reference or table.baseline, *divided}
    chosen = matching("row", rows, [*table.rows]) | needed
    allowed = matching("case", cases, [*table.cases])
    return table.changed(
        rows={label: values for label, values in table.rows.items() if label in chosen},
        cases={label: values for label, values in table.cases.items() if label in allowed},
        seeds=tuple(table.seeds if seeds is None else seeds),
        after={label: name for label, name in table.after.items() if label in chosen},
    )

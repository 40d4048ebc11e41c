"""Tables of comparisons: rows of settings, found by name or path, and checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from raypkg.core.config import with_current_names
from raypkg.core.errors import UserError, shown, unknown
from raypkg.experiments import experiment, training_settings_of

from .shipped import SUFFIX, TABLES, shipped_files

SCALES = ("small", "paper")
Values = Mapping[str, Any]  # settings by dotted names
MOST_TRIALS = 10_000
REST = "all"  # the one case of a table without cases


@dataclass(frozen=True)
class Table:
    """What is compared with what.

    Each row is run in each case from each seed; a trial's settings are those of all rows, of its case and of its row,
    the later the stronger. Rows are compared with the baseline of the same case and seed.

    Attributes:
        title: one line on what it shows.
        experiment: whose runs the trials are.
        baseline: the row that the others are compared with.
        rows: settings by label.
        cases: settings by label; every row is run in each.
        shared: settings of all rows; options of the user win over them.
        seeds: of the runs.
        metric: what is compared, known at the end of a run.
        goals: values of a metric that every epoch has, such as {"accuracy": [0.9]}: what reaching them costs.
        columns: further figures by heading, see ``measures``.
        paper: published figures: heading → row → what is printed there.
        after: row → ``package.module:function``, called with the finished run; the figures that it returns are kept.
    """

    title: str
    experiment: str
    baseline: str
    rows: Mapping[str, Values]
    cases: Mapping[str, Values] = field(default_factory=lambda: {REST: {}})
    shared: Values = field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    metric: str = "test_accuracy"
    goals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    paper: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)

    def trial(self, case: str, row: str, seed: int) -> dict[str, Any]:
        """Return what one trial sets beyond what all share."""
        return {**self.cases[case], **self.rows[row], "seed": seed}

    def varied(self) -> set[str]:
        """Return the names of the settings in which trials may differ."""
        return {name for values in (*self.cases.values(), *self.rows.values()) for name in values} | {"seed"}

    def plain(self) -> dict[str, Any]:
        """Return it as a sweep's record keeps it."""
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Table:
        """Return a table from a sweep's record.

        Raises:
            UserError: it holds none.
        """
        known = {each.name for each in fields(cls)}
        try:
            table = cls(**{name: value for name, value in record.items() if name in known})
            _check(table, "the table of this comparison")
            current = partial(with_current_names, training_settings_of(experiment[table.experiment]))
            table = replace(
                table,
                shared=current(table.shared),
                rows={label: current(values) for label, values in table.rows.items()},
                cases={label: current(values) for label, values in table.cases.items()},
            )
        except (TypeError, AttributeError) as error:
            raise UserError(f"the record of this comparison holds no table: {error}") from None
        return table


def renamed(after: str) -> str:
    """Return a function's current name; stored comparisons may have an earlier one."""
    return after.replace("raypkg.studies.deletions:", "raypkg.methods.deltagrad.experiment:")


def open_table(name: str, scale: str = SCALES[0]) -> Table:
    """Find a table and read it at a scale.

    Args:
        name: in ``tune_spaces/tables`` of the working folder or of this package, or a path.
        scale: "small" (seconds to minutes a run) or "paper" (as published).

    Raises:
        UserError: there is none of that name, the nearest one named, or its file is no table.
    """
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    file = Path(name)
    if not name.endswith(SUFFIX):
        tables = shipped_files(TABLES)
        if name not in tables:
            raise unknown("table", name, tables)
        file = tables[name]
    try:
        text = file.read_text()
    except FileNotFoundError:
        raise UserError(f"there is no table file {name!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(f"cannot read the table {str(file)!r}: {reason}") from None
    return read_table_file(text, str(file), scale)


def read_table_file(text: str, origin: str, scale: str) -> Table:
    """Run a table's file.

    Args:
        text: of the file.
        origin: names it in errors.
        scale: that its function is given.

    Raises:
        UserError: it raises, has no function ``table`` that returns a ``Table``, or the table contradicts itself.
    """
    content: dict[str, Any] = {"__name__": "table", "__file__": origin}
    try:
        exec(compile(text, origin, "exec"), content)
        if "table" not in content:
            raise UserError(f"table {origin!r} defines no function table(scale)")
        table = content["table"](scale)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # it is the user's code
        raise UserError(f"table {origin!r} raises {type(error).__name__}: {error}") from None
    if not isinstance(table, Table):
        raise UserError(
            f"table {origin!r}: table({scale!r}) returned {shown(table)}, not a raypkg.studies.tables.Table"
        )
    _check(table, f"table {origin!r}")
    return table


def narrowed(
    table: Table, rows: Iterable[str] | None, cases: Iterable[str] | None, seeds: Sequence[int] | None
) -> Table:
    """Return the table with some rows, the baseline always among them, some cases and other seeds.

    Args:
        table: the whole one.
        rows: labels, or patterns such as ``crest*``; None = all.
        cases: likewise.
        seeds: None = the table's own.

    Raises:
        UserError: nothing is called so, the nearest named.
    """
    chosen = _matching("row", rows, table.rows)
    some = {label: values for label, values in table.rows.items() if label in chosen or label == table.baseline}
    allowed = _matching("case", cases, table.cases)
    return replace(
        table,
        rows=some,
        cases={label: values for label, values in table.cases.items() if label in allowed},
        seeds=tuple(table.seeds if seeds is None else seeds),
        after={label: name for label, name in table.after.items() if label in some},
    )


def _matching(kind: str, patterns: Iterable[str] | None, labels: Iterable[str]) -> set[str]:
    """Return the labels that any pattern fits."""
    everyone = list(labels)
    if patterns is None:
        return set(everyone)
    matching: set[str] = set()
    for pattern in patterns:
        found = {label for label in everyone if label == pattern or fnmatchcase(label, pattern)}
        if not found:
            raise unknown(kind, pattern, everyone)
        matching |= found
    return matching


def _check(table: Table, whose: str) -> None:
    """Refuse a table that contradicts itself; its settings are checked with those of the user."""
    labels = [*table.rows, *table.cases]
    if wrong := next((label for label in labels if not _is_label(label)), None):
        raise UserError(f"{whose}: {shown(wrong)} is no label: a text without commas is needed")
    if not table.rows or not table.cases:
        raise UserError(f"{whose} has no row or no case")
    if table.baseline not in table.rows:
        raise UserError(f"{whose}: the baseline: {unknown('row', table.baseline, table.rows)}")
    if lost := next((row for row in table.after if row not in table.rows), None):
        raise UserError(f"{whose}: after: {unknown('row', lost, table.rows)}")
    check_seeds(table.seeds, f"{whose}: seeds")
    trials = len(table.rows) * len(table.cases) * len(table.seeds)
    if trials > MOST_TRIALS:
        raise UserError(f"{whose} has {trials:,} trials: at most {MOST_TRIALS:,}")


def check_seeds(seeds: Sequence[Any], whose: str) -> None:
    """Refuse what are no distinct seeds.

    Raises:
        UserError: what is wrong.
    """
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)
    if not (seeds and whole and len(set(seeds)) == len(seeds)):
        raise UserError(f"{whose} = {shown(list(seeds))}: distinct integers of 0 or more are needed")


def _is_label(label: Any) -> bool:
    return isinstance(label, str) and bool(label.strip()) and "," not in label and label.isprintable()

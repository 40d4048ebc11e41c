"""A comparison: the trials of a table that are missing are run, and what came of all of them is written and shown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raypkg.core.address import folder_and_name
from raypkg.core.config import dotted, load_settings, load_stored
from raypkg.core.errors import Interruption, UserError, shown
from raypkg.core.registry import Entry
from raypkg.core.settings import APART, Experiment
from raypkg.experiments import experiment, training_settings_of
from raypkg.experiments.outlook import stages_of
from raypkg.experiments.resolve import check_names, with_absolute_paths
from raypkg.experiments.trust import check_code
from raypkg.runs.activity import resuming
from raypkg.runs.folder import discard
from raypkg.runs.show import terminal
from raypkg.runs.stages import Stage
from raypkg.runs.storage import Storage

from .comparison_show import conclude_comparison, show_comparison
from .figures import METRICS
from .order import ALL_TO_THE_END, Order, base_of, check_counts
from .outcomes import numbers_of, run_identity, trials_of_table
from .sweep import Progress, check_root, size_of_trials
from .sweep_folder import FAILED, FOLDER, RECORD, UNFINISHED, SweepFolder, create_sweep, find_sweep
from .tables import Table
from .trial import imported_function, run_trial
from .trial_settings import check_trial


@dataclass(frozen=True)
class Asked:
    """What a user asked for.

    Attributes:
        table: its name or path.
        scale: small or paper.
        content: the table, or those of its rows, cases and seeds that were asked for.
        concurrent: trials at once; None = as many as fit.
    """

    table: str
    scale: str
    content: Table
    concurrent: int | None


def compare_rows(asked: Asked, config: Path | None, values: Mapping[str, Any], name: str | None, root: str) -> None:
    """Check everything, then run the trials that no earlier call has finished, and show the table.

    Args:
        asked: what to compare.
        config: a file of settings for all rows, or None.
        values: further settings for all rows, which win over it and over the table's shared ones.
        name: of the comparison; made up from table, data set and scale when None.
        root: of all runs.

    Raises:
        UserError: bad settings, a comparison of that name with others, or the user interrupted.
    """
    check_root(root)
    check_counts(Order(asked.content.experiment, concurrent=asked.concurrent))
    table = asked.content
    settings = base_settings(table, config, values)
    check_comparison(table, settings)
    name = name or f"{Path(asked.table).stem}-{_short_name(settings.dataset.name)}-{asked.scale}"
    sweeps = Storage(root) / FOLDER
    is_new = name not in sweeps.list()
    if is_new:
        folder = create_sweep(root, name, _order(asked), settings, None, [])
    else:
        folder = find_sweep(root, name)
        _check_same(folder, asked, settings)
    try:
        with folder.storage.alone(f"comparison {name!r}"):
            folder = SweepFolder(folder.storage)  # as whoever had the lock left it
            _enlist(folder, table)
            folder.change({"table": _united(folder, table).plain(), "concurrent": asked.concurrent}, settings)
            _Comparison(folder, table, settings, root).run()
    except BaseException:
        has_begun = any(folder.run_storage(number).list() for number in range(len(folder.trials)))
        if is_new and not has_begun:
            discard(folder.storage)
        raise


def resume_comparison(name: str, values: Mapping[str, Any], concurrent: int | None, table: str, root: str) -> None:
    """Run the trials of a comparison that are not done, with the settings and rows that it was begun with.

    Args:
        name: of the comparison.
        values: settings that say where and not what, where they are to change.
        concurrent: trials at once.
        table: that it must be of.
        root: of all runs.

    Raises:
        UserError: no such comparison of this table, or what would change its results.
    """
    if settled := next((setting for setting in values if setting.partition(".")[0] not in APART), None):
        raise UserError(
            f"--resume {name} keeps the settings: {settled} cannot change, only cluster.*, track.* and --concurrent"
        )
    check_root(root)
    folder = find_sweep(root, name)
    if folder.table is None or folder.order["asked"] != table:
        raise UserError(
            f"{name!r} is no comparison of table {table}: continue it with {folder.command} --resume {name}"
        )
    check_counts(Order(folder.experiment, concurrent=concurrent))
    check_code(folder.storage, folder.config)
    for trial in folder.trials:
        check_code(folder.storage, trial["settings"], RECORD)
        check_code(folder.storage, {"after": trial.get("after") or ""}, RECORD)
    settings = load_stored(training_settings_of(experiment[folder.experiment]), folder.config, values)
    with folder.storage.alone(f"comparison {name!r}"):
        folder.change({"concurrent": concurrent}, settings)
        _Comparison(folder, Table.of(folder.table), settings, root).run()


def base_settings(table: Table, config: Path | None, values: Mapping[str, Any]) -> Experiment:
    """Return the settings that all rows share.

    Raises:
        UserError: unknown settings, wrong values, or one that rows or cases vary.
    """
    schema = training_settings_of(_entry(table))
    varied = {_full_name(name) for name in table.varied()}
    if given := next((name for name in values if _full_name(name) in varied), None):
        instead = "--seeds" if given == "seed" else "--rows and --cases"
        raise UserError(f"{given} is what the rows or cases of the table differ in and cannot be given: see {instead}")
    base = base_of(schema, config)
    settings = with_absolute_paths(load_settings(schema, base, {**table.shared, **values}))
    check_names(settings)
    return settings


def _entry(table: Table) -> Entry:
    return experiment[table.experiment]


def _full_name(name: str) -> str:
    """Return the name of a setting without ``.name``: ``model`` and ``model.name`` are the same."""
    return name.removesuffix(".name")


def check_comparison(table: Table, settings: Experiment) -> None:
    """Refuse a metric, a goal or a trial that a single run would refuse, or not measure."""
    for metric in (table.metric, *table.goals):
        if metric not in METRICS:
            raise UserError(f"table: {shown(metric)} is no metric: {', '.join(METRICS)}")
    if short := next((metric for metric in table.goals if not METRICS[metric].each_epoch), None):
        raise UserError(f"table: {short} is known only at the end of a run, so no goal can be reached before")
    for name in table.after.values():
        imported_function(name)
    order = Order(table.experiment, metric=table.metric)
    for case in table.cases:
        for row in table.rows:
            try:
                check_trial(order, settings, table.trial(case, row, table.seeds[0]))
            except UserError as error:
                raise UserError(f"row {row!r}, case {case!r}: {error}") from None


def _short_name(dataset: str) -> str:
    """Return what a data set is called in names of folders.

    >>> _short_name("parquet:/data/cifar10"), _short_name("my_code:load"), _short_name("table:s3://bucket/x.csv?a=/b")
    ('cifar10', 'load', 'x.csv')
    """
    last = folder_and_name(dataset)[1].rpartition(":")[2]
    return re.sub(r"[^\w.+-]", "-", last).lstrip(".-") or "data"


def _order(asked: Asked) -> dict[str, Any]:
    table = asked.content
    order = Order(
        table.experiment,
        samples=0,
        metric=table.metric,
        mode=METRICS[table.metric].mode,
        scheduler=ALL_TO_THE_END,
        concurrent=asked.concurrent,
    )
    plain = {name: getattr(order, name) for name in ("experiment", *Order.options())}
    return plain | {"varied": [], "fixed": {}, "asked": asked.table, "scale": asked.scale, "table": table.plain()}


def _check_same(folder: SweepFolder, asked: Asked, settings: Experiment) -> None:
    """Refuse to go on with a comparison under other settings than it was begun with."""
    name = folder.name
    if folder.table is None or folder.order["asked"] != asked.table or folder.experiment != asked.content.experiment:
        raise UserError(f"{name!r} in {folder.root}/{FOLDER} is not a comparison of {asked.table}: give another --name")
    excluded = set(APART)
    here = dotted(settings.model_dump(mode="json", exclude=excluded))
    stored = load_stored(type(settings), folder.config)
    there = dotted(stored.model_dump(mode="json", exclude=excluded))
    if differing := next((key for key in {**there, **here} if there.get(key) != here.get(key)), None):
        raise UserError(
            f"comparison {name!r} was begun with {differing} = {shown(there.get(differing))}, now it is"
            f" {shown(here.get(differing))}: give another --name"
        )


def _enlist(folder: SweepFolder, table: Table) -> None:
    """Add the trials of a table that the folder has not: rows of the same settings are one run."""
    known = numbers_of(folder)
    wanted = {run_identity(table, *trial): trial for trial in trials_of_table(table)}
    new = [trial for key, trial in wanted.items() if key not in known]
    folder.extend((table.trial(*trial), table.after.get(trial[1])) for trial in new)


def _united(folder: SweepFolder, table: Table) -> Table:
    """Return the table with the rows, cases and seeds of earlier calls beside its own, which win."""
    assert folder.table is not None
    before = Table.of(folder.table)
    plain = table.plain()
    for part in ("rows", "cases", "after"):
        plain[part] = {**getattr(before, part), **plain[part]}
    plain["seeds"] = [*before.seeds, *(seed for seed in table.seeds if seed not in before.seeds)]
    return Table.of(plain)


class _Comparison:
    """A comparison that is being run.

    Args:
        folder: of it.
        table: the rows, cases and seeds that were asked for.
        settings: that all trials share.
        root: of all runs, as the user gave it.
    """

    def __init__(self, folder: SweepFolder, table: Table, settings: Experiment, root: str):
        self.folder = folder
        self.table = table
        self.settings = settings
        self.console = terminal()
        self.again = resuming(folder.command, folder.storage, root)
        self.titles: dict[int, str] = {}
        numbers = numbers_of(folder)
        for case, row, seed in trials_of_table(table):
            number = numbers.get(run_identity(table, case, row, seed))
            if number is not None:  # of a comparison that is resumed, each call may have had other rows and seeds
                place = f"{row}; {case}" if len(table.cases) > 1 else row
                self.titles.setdefault(number, f"{place}; seed {seed}")

    def run(self) -> None:
        """Run what is missing, then write and show what came of it.

        Raises:
            UserError: the user interrupted.
        """
        interrupted = False
        try:
            interrupted = self._run_missing()
        except KeyboardInterrupt:
            interrupted = True
        except Interruption as error:
            raise type(error)(f"{error}; resume with: {self.again}") from error
        finally:
            conclude_comparison(self.folder)
        show_comparison(self.folder, self.console, self.table)
        left = len(self._missing())
        if interrupted:
            raise Interruption(f"interrupted, {left} trials left; resume with: {self.again}")
        if left:
            line = f"{left} of {len(self.titles)} trials are not done; resume with: {self.again}"
            self.console.print(line, soft_wrap=True)

    def _missing(self) -> list[tuple[int, dict[str, Any]]]:
        """Return number and settings of the trials to run."""
        states = (UNFINISHED, FAILED)
        numbers = [number for number in self.titles if self.folder.state(number) in states]
        return [(number, self.folder.trials[number]["settings"]) for number in numbers]

    def _run_missing(self) -> bool:
        """Run the trials, on Ray or one after another in this process; return whether the user interrupted."""
        missing = self._missing()
        done = len(self.titles) - len(missing)
        self.console.print(f"{self.folder.name}: {len(missing)} trials of {self.folder.experiment} to run, {done} done")
        if not missing:
            return False
        progress = Progress(self.folder, self.console, self.titles)
        if self.settings.cluster.workers == 0:
            _run_here(self.folder, missing, progress)
            return False
        return self._run_on_ray(missing, progress)

    def _run_on_ray(self, missing: Sequence[tuple[int, dict[str, Any]]], progress: Progress) -> bool:
        size = size_of_trials(self.settings, self.folder.order["concurrent"])

        from raypkg.cluster.search import Proposals
        from raypkg.cluster.trials import Rules, run_trials

        rules = Rules(
            metric=self.folder.metric,
            mode=self.folder.mode,
            scheduler=ALL_TO_THE_END,
            longest=self.settings.epochs,
            seconds=None,
            failures=self.settings.cluster.max_failures,
        )
        storage = self.folder.storage
        stages = stages_of(self.folder.experiment, self.settings)
        interrupted = run_trials(
            partial(run_trial, root=storage.root, workers=size.workers),
            Proposals(_donors_first(missing, stages)),
            progress,
            size,
            rules,
            folder=(storage / "ray").uri,
        )
        storage.delete_folder("ray")
        return interrupted


def _donors_first(
    missing: Sequence[tuple[int, dict[str, Any]]], stages: Sequence[Stage]
) -> list[tuple[int, dict[str, Any]]]:
    """Put, within each seed, one trial of those that share a first phase before the others, which then take it over."""
    shared = next((stage for stage in stages if stage.depends_on), None)
    if shared is None:
        return list(missing)
    first: dict[str, int] = {}  # trial of each group
    for number, values in missing:
        group = json.dumps(shared.settings_in(values), sort_keys=True)
        first.setdefault(group, number)
    donors = set(first.values())
    seeds = list(dict.fromkeys(values["seed"] for _, values in missing))
    return sorted(missing, key=lambda trial: (seeds.index(trial[1]["seed"]), trial[0] not in donors))


def _run_here(folder: SweepFolder, missing: Sequence[tuple[int, dict[str, Any]]], progress: Progress) -> None:
    """Run trials one after another in this process, without Ray."""
    for number, values in missing:
        progress.started(number, values)
        last = run_trial(number, values, lambda row: None, root=folder.storage.root, workers=0)
        progress.ended(number, last.get("error"))

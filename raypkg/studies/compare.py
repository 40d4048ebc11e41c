"""``effray compare``: a study whose trials are the rows of a table, each in every case and from every seed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raypkg.core.address import folder_and_name
from raypkg.core.config import dotted, load_settings
from raypkg.core.errors import UserError, shown
from raypkg.core.registry import imported
from raypkg.core.settings import APART, Experiment
from raypkg.experiments import experiment, training_settings_of
from raypkg.experiments.phases import BOUND, operations, stages_of
from raypkg.experiments.resolve import resolve
from raypkg.models import model
from raypkg.runs.storage import Storage

from .driver import (
    Driver,
    base_of,
    check_counts,
    check_data,
    check_root,
    check_trial,
    data_digests,
    reopened,
    samples_of,
    varied,
)
from .figures import HELD_OUT
from .outcomes import Outcomes
from .study import FOLDER, Order, Study, Trial, create_study, find_study
from .tables import METRICS, REST, Table, stored_table, with_data

# A trial on one core, as measured on small plans: operations a second, overhead of a step, and start and end.
OPERATIONS_A_SECOND, STEP_SECONDS, TRIAL_SECONDS = BOUND / 15, 0.005, 1.5


def compare_rows(
    asked: str,
    scale: str,
    table: Table,
    concurrent: int | None,
    config: Path | None,
    values: Mapping[str, Any],
    name: str | None,
    root: str,
) -> list[str]:
    """Check everything, then run the trials that no earlier call has finished, and show the table.

    ``table`` has the requested rows, cases and seeds of the table ``asked``. Settings in ``values`` win over its shared
    ones, and these over the file ``config``. The default name is table, data set and scale. Bad settings are refused,
    and so is a name that a comparison with other settings has.
    """
    check_root(root)
    check_counts({"concurrent": concurrent})
    published, table = table, with_data(table, values)
    settings = base_settings(table, config, values)
    check_comparison(table, settings)
    is_other_data = table is not published
    if is_other_data or table.rates or _lasting(settings) != _lasting(base_settings(table, None, {})):
        table = table.changed(paper={})  # the data or the settings are not the paper's
    if name is None:
        has_own_data = any("dataset.name" in case for case in table.cases.values())
        data = "" if has_own_data else f"-{_short_name(settings.dataset.name)}"
        name = f"{Path(asked).stem}{data}-{scale}"
    united = table.model_dump()
    order = Order(
        experiment=table.experiment,
        metric=table.metric,
        mode=METRICS[table.metric].mode,
        samples=0,
        concurrent=concurrent,
        asked=asked,
        scale=scale,
        table=united,
    )
    studies = Storage(root) / FOLDER
    is_new = name not in studies.list()
    study = create_study(root, name, order, settings, None, []) if is_new else find_study(root, name)
    _check_same(study, order, settings)
    with study.storage.locked(f"comparison {name!r}"):
        study = Study(study.storage)  # another process may have changed it before this one had the lock
        check_data(study, settings)
        known = study.numbers()
        wanted = {table.identity(*place): place for place in table.places()}
        new = [(table.trial(*wanted[each]), wanted[each][1]) for each in wanted if each not in known]
        digests = data_digests(settings, (values for values, _ in new))
        study.extend(
            Trial(settings=values, after=table.after.get(row), digest=digest)
            for (values, row), digest in zip(new, digests, strict=True)
        )
        # The record unites the rows, cases and seeds of all calls; those of this call win.
        earlier = stored_table(study.order.table or {})
        for part in ("rows", "cases", "after"):
            united[part] = {**getattr(earlier, part), **united[part]}
        united["seeds"] = [*earlier.seeds, *(seed for seed in table.seeds if seed not in earlier.seeds)]
        study.change(settings, table=united, concurrent=concurrent)
        try:
            driver = Driver(study, settings, root, table=table)
        except BaseException:  # no cluster, or one too small
            if is_new:
                study.storage.delete_folder()
            raise
        driver.run()
        return words(study, table)


def plan(table: Table, config: Path | None, values: Mapping[str, Any], rate: float | None) -> Iterator[str]:
    """Yield the trials of a comparison with their samples backward, and their hours at a rate in samples a second.

    Without a rate, the hours of registered models on one processor core are estimated. Passes that select, look or
    correct are not counted.
    """
    table = with_data(table, values)
    settings = base_settings(table, config, values)
    check_comparison(table, settings)
    seeds = len(table.seeds) * max(1, len(table.rates))
    total = 0
    seconds = 0.0
    for case in table.cases:
        for row in table.rows:
            changes = table.trial(case, row, table.seeds[0])
            n = check_trial(table.metric, settings, changes)
            trial = varied(settings, changes)
            stages = stages_of(table.experiment, trial)
            backward = sum(stage.backward(n) for stage in stages)
            total += seeds * backward
            if trial.model.name in model:
                steps = sum(stage.steps(n) for stage in stages if stage.rows)
                computed = operations(trial.model, samples_of(trial), stages) / OPERATIONS_A_SECOND
                seconds += seeds * (computed + STEP_SECONDS * steps + TRIAL_SECONDS)
            else:
                seconds = math.nan
            place = row if case == REST else f"{row}; {case}"
            yield f"{place}: {seeds} trials of {backward:,} samples backward"
    trials = seeds * len(table.cases) * len(table.rows)
    hours = "" if math.isnan(seconds) else f", about {seconds / 3600:,.1f} hours on one processor core"
    if rate:
        hours = f", {total / rate / 3600:,.1f} hours at {rate:g} a second"
    yield f"{trials} trials, {total:,} samples backward{hours}"


def words(study: Study, table: Table) -> list[str]:
    """Return the verdicts on the rows of a table."""
    return [found["verdict"] for found in Outcomes(study, table).verdicts()]


def resume_comparison(name: str, values: Mapping[str, Any], concurrent: int | None, asked: str, root: str) -> list[str]:
    """Run the trials of a comparison that are not done, perhaps on another cluster; return its verdicts."""
    if fixed := next((setting for setting in values if setting.partition(".")[0] not in APART), None):
        raise UserError(
            f"--resume {name} keeps the settings: {fixed} cannot change, only cluster.*, track.* and --concurrent"
        )
    study = reopened(root, name)
    if study.order.table is None or study.order.asked != asked:
        raise UserError(f"{name!r} is no comparison of table {asked}: continue it with {study.command} --resume {name}")
    check_counts({"concurrent": concurrent})
    settings = load_settings(training_settings_of(experiment[study.experiment]), study.config, values)
    check_data(study, settings)
    with study.storage.locked(f"comparison {name!r}"):
        study.change(settings, concurrent=concurrent)
        table = stored_table(study.order.table)
        Driver(study, settings, root, table=table).run()
        return words(study, table)


def base_settings(table: Table, config: Path | None, values: Mapping[str, Any]) -> Experiment:
    """Return the settings that all rows share; refuse a given one in which rows or cases differ."""
    schema = training_settings_of(experiment[table.experiment])
    elsewhere = ["seed", *["train.lr"] * bool(table.rates)]
    parts = (*table.cases.values(), *table.rows.values(), elsewhere)
    varied = {name.removesuffix(".name") for part in parts for name in part}  # model and model.name are the same
    if given := next((name for name in values if name.removesuffix(".name") in varied), None):
        instead = "--seeds" if given == "seed" else "--rows and --cases"
        raise UserError(f"{given} is what the rows or cases of the table differ in and cannot be given: see {instead}")
    return resolve(schema, base_of(schema, config), {**table.shared, **values}, shared=True)


def check_comparison(table: Table, settings: Experiment) -> None:
    """Refuse a trial that a single run would refuse, or that would not measure the metric."""
    for name in table.after.values():
        imported("after function", name)
    for case in table.cases:
        for row in table.rows:
            try:
                for rate in table.rates or (None,):
                    trial = table.trial(case, row, table.seeds[0], rate)
                    check_trial(HELD_OUT if table.rates else table.metric, settings, trial)
            except UserError as error:
                raise UserError(f"row {row!r}, case {case!r}: {error}") from None


def _short_name(dataset: str) -> str:
    """Return the name of a data set in names of folders.

    >>> _short_name("parquet:/data/cifar10"), _short_name("my_code:load"), _short_name("table:s3://bucket/x.csv?a=/b")
    ('cifar10', 'load', 'x.csv')
    """
    last = folder_and_name(dataset)[1].rpartition(":")[2]
    return re.sub(r"[^\w.+-]", "-", last).lstrip(".-") or "data"


def _lasting(settings: Experiment) -> dict[str, Any]:
    return dotted(settings.model_dump(mode="json", exclude=set(APART)))


def _check_same(study: Study, order: Order, settings: Experiment) -> None:
    """Refuse to continue a comparison of another table or with other settings."""
    name = study.name
    if (study.order.asked, study.experiment) != (order.asked, order.experiment):
        raise UserError(f"{name!r} in {study.root}/{FOLDER} is not a comparison of {order.asked}: give another --name")
    stored = load_settings(type(settings), study.config)
    here, there = _lasting(settings), _lasting(stored)
    if differing := next((key for key in {**there, **here} if there.get(key) != here.get(key)), None):
        raise UserError(
            f"comparison {name!r} was begun with {differing} = {shown(there.get(differing))}, now it is"
            f" {shown(here.get(differing))}: give another --name"
        )

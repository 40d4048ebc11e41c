"""The start of a study, by a space or a table, and its resumption: everything is checked before a trial runs.

A tune space is a file of Python code whose domains the trials of a sweep are drawn from.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from raypkg.cluster.session import prepare
from raypkg.core.address import folder_and_name
from raypkg.core.config import (
    Settings,
    check_switches,
    dotted,
    first_problem,
    leaves,
    load_settings,
    read_toml,
    with_current_names,
)
from raypkg.core.errors import UserError, redacted, shown, unknown
from raypkg.core.registry import Entry, imported
from raypkg.core.seeds import derive
from raypkg.core.settings import APART, Dataset, Experiment, RunSettings, Training
from raypkg.experiments import experiment, training_settings_of
from raypkg.experiments.phases import BOUND, operations, stages_of
from raypkg.experiments.resolve import check_code, check_file_of_code, check_names, resolve
from raypkg.experiments.samples import Samples, open_samples
from raypkg.models import model
from raypkg.runs.folder import CONFIG, read_settings
from raypkg.runs.storage import Storage

from .driver import EVALUATE, Driver, varied
from .outcomes import HELD_OUT
from .study import FOLDER, RECORD, SPACE, TO_THE_END, Order, Study, Trial, Values, create_study, find_study
from .tables import METRICS, MOST_TRIALS, REST, Table, read_code, run_code, shipped_files, stored_table, with_data

SPACES = "tune_spaces"
DRAWS = 1000  # attempts to draw settings that no other trial has
SAMPLES = 8  # trials
NAMES = {
    "mode": ("max", "min"),
    "scheduler": ("asha", "hyperband", "median", TO_THE_END),
    "search": ("random", "grid", "optuna"),
}
CHANGEABLE = ("concurrent", "time_budget")  # options of a resumed study
Asked = Mapping[str, Any]  # given options by their names in Order
# A trial on one core, as measured on small plans: operations a second, overhead of a step, and start and end.
OPERATIONS_A_SECOND, STEP_SECONDS, TRIAL_SECONDS = BOUND / 15, 0.005, 1.5


def start_sweep(
    entry: Entry, asked: Asked, config: Path | None, values: Mapping[str, Any], name: str | None, root: str
) -> None:
    """Check everything, then run a new sweep; a mistake leaves no folder behind and starts no Ray.

    Settings in ``values`` win over those in the file ``config``. The default name is experiment and time.
    """
    check_root(root)
    schema = training_settings_of(entry)
    settings = resolve(schema, base_of(schema, config), values, shared=True)
    space = open_space(asked.get("space", entry.name if entry.name in shipped_files(SPACES) else "train"))
    fixed = {name.removesuffix(".name") for name in values}  # model and model.name are the same
    domains = {name: domain for name, domain in space.domains.items() if name.removesuffix(".name") not in fixed}
    space = space.model_copy(update={"domains": domains})
    check_switches({**dict.fromkeys(domains), **values})  # a disabled part stays disabled in every trial

    chosen = {"metric": space.metric, "scheduler": "asha", "search": "random", "samples": SAMPLES, **asked}
    metric, scheduler = chosen["metric"], chosen["scheduler"]
    if metric in METRICS:
        chosen.setdefault("mode", space.mode if metric == space.metric else METRICS[metric].mode)
    for option, allowed in {"metric": METRICS, **NAMES}.items():
        if chosen[option] not in allowed:
            raise unknown(option, chosen[option], allowed)
    if scheduler != TO_THE_END and not METRICS[metric].each_epoch:
        problem = f"metric {metric} is known only at the end of a trial, so --scheduler {scheduler} could not act on it"
        raise UserError(f"{problem}: give --scheduler {TO_THE_END}, or --metric accuracy")
    if chosen["search"] == "grid" and "samples" in asked:
        raise UserError(f"--samples {asked['samples']}: a grid has as many trials as combinations")
    order = Order(experiment=entry.name, varied=[*domains], **chosen)

    def check(values: Values) -> None:
        if order.search == "optuna":  # trials are yet unknown: each value is tried as one
            check_trial(metric, settings, values)
        else:
            check_names(varied(settings, values))

    check_space(space, check)
    trials = trials_of(order, space, settings)
    for number, trial in enumerate(trials):
        try:
            check_trial(metric, settings, trial)
        except UserError as error:
            raise UserError(f"trial {number}: {error}") from None
    order = order.model_copy(update={"samples": len(trials) or order.samples})
    digests = data_digests(settings, trials)
    known = [Trial(settings=values, digest=digest) for values, digest in zip(trials, digests, strict=True)]
    name = name or f"{entry.name}-{time.strftime('%m%d-%H%M%S')}"
    study = create_study(root, name, order, settings, space.text, known)
    with study.storage.locked(f"study {name!r}"):
        Driver(study, settings, root, domains=domains, is_new=True).run()


def start_comparison(
    asked: str,
    scale: str,
    table: Table,
    concurrent: int | None,
    config: Path | None,
    values: Mapping[str, Any],
    name: str | None,
    root: str,
) -> list[str]:
    """Check everything, then run the trials that no earlier call has finished; return the verdicts.

    ``table`` has the requested rows, cases and seeds of the table ``asked``. Settings in ``values`` win over its shared
    ones, and these over the file ``config``. The default name is table, data set and scale. Bad settings are refused,
    and so is a name that a comparison with other settings has.
    """
    check_root(root)
    published, table = table, with_data(table, values)
    settings = base_settings(table, config, values)
    check_comparison(table, settings)
    is_other_data = table is not published
    if is_other_data or table.rates or _lasting(settings) != _lasting(base_settings(table, None, {})):
        table = table.changed(paper={})  # the data or the settings are not the paper's
    if name is None:
        data = ""
        if not any("dataset.name" in case for case in table.cases.values()):
            last = folder_and_name(settings.dataset.name)[1].rpartition(":")[2]  # of parquet:/data/cifar10, cifar10
            data = "-" + (re.sub(r"[^\w.+-]", "-", last).lstrip(".-") or "data")
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
    is_new = name not in (Storage(root) / FOLDER).list()
    study = create_study(root, name, order, settings, None, []) if is_new else find_study(root, name)
    if (study.order.asked, study.experiment) != (asked, order.experiment):
        raise UserError(f"{name!r} in {study.root}/{FOLDER} is not a comparison of {asked}: give another --name")
    here, there = _lasting(settings), _lasting(load_settings(type(settings), study.config))
    if differing := next((key for key in {**there, **here} if there.get(key) != here.get(key)), None):
        raise UserError(
            f"comparison {name!r} was begun with {differing} = {shown(there.get(differing))}, now it is"
            f" {shown(here.get(differing))}: give another --name"
        )
    with study.storage.locked(f"study {name!r}"):
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
        return Driver(study, settings, root, table, is_new=is_new).run()


def resume_study(name: str, command: str, asked: Asked, values: Mapping[str, Any], root: str) -> list[str]:
    """Run the trials that are not done of a study that ``command`` began; return the verdicts of a comparison.

    Options beyond ``CHANGEABLE`` and settings that would alter its results are refused, and so is code in its files
    that is not trusted.
    """
    fixed = [f"--{option.replace('_', '-')}" for option in asked if option not in CHANGEABLE]
    fixed += [setting for setting in values if setting.partition(".")[0] not in APART]
    if fixed:
        others = "only --concurrent, --time-budget of a sweep, cluster.* and track.*"
        raise UserError(f"--resume {name} keeps what was asked for: {fixed[0]} cannot change, {others}")
    check_root(root)
    study = find_study(root, name)
    check_code(study.storage, study.config)
    for trial in study.trials:
        check_code(study.storage, {**(trial.settings or {}), "after": trial.after or ""}, RECORD)
    if study.command != command:
        raise UserError(f"{name!r} was not begun by {command}: resume it with {study.command} --resume {name}")
    schema = training_settings_of(experiment[study.experiment])
    settings = load_settings(schema, study.config, values)
    table, domains = None, {}
    if study.order.table:
        table = stored_table(study.order.table)
    else:
        file = f"{study.storage.root}/{SPACE}"
        check_file_of_code(study.storage, SPACE)
        text = (study.storage.read(SPACE) or b"").decode(errors="replace")
        current = with_current_names(schema, read_space(text, file).domains)
        domains = {name: domain for name, domain in current.items() if name in study.order.varied}
    check_data(study, settings)
    with study.storage.locked(f"study {name!r}"):
        study.change(settings, **asked)
        return Driver(study, settings, root, table, domains).run()


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
    for case, row in product(table.cases, table.rows):
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


# Spaces


class Space(BaseModel):
    """Domains to draw settings from, and the metric to optimise."""

    text: str  # content of the file
    domains: dict[str, Any]  # Ray Tune's domains, or plain values, by dotted names of settings
    metric: str
    mode: str  # max or min


def open_space(name: str) -> Space:
    """Read a space by its name in ``tune_spaces`` or its path; a file of the working folder wins."""
    return read_space(*read_code("space", name, SPACES))


def read_space(text: str, origin: str) -> Space:
    """Run a space's file; refuse one that raises, that lacks a name, or from which nothing can be drawn."""
    prepare()  # before a space, or the next line, imports Ray Tune
    from raypkg.cluster.trials import candidates, draw_settings

    needed = {name: name for name in ("space", "METRIC", "MODE")}
    content, metric, mode = run_code("space", text, origin, needed)
    try:
        space = Space(text=text, domains=content, metric=metric, mode=mode)
    except ValidationError as error:
        raise UserError(f"space {origin!r}: {first_problem(error)}") from None
    for name, domain in space.domains.items():
        try:
            json.dumps([draw_settings({name: domain}, np.random.default_rng(0)), candidates(domain)])
        except (Exception, SystemExit) as error:  # a domain may hold the user's code
            raise UserError(f"space {origin!r}: nothing can be drawn for {name}: {error}") from None
    return space


def check_space(space: Space, check: Callable[[Values], None]) -> None:
    """Refuse a space with an unknown setting, with a value that its setting does not allow, or of one point.

    Each choice and both ends of each range are checked, with the first values of the other settings.
    """
    from raypkg.cluster.trials import candidates, constants

    choices = {name: candidates(domain) for name, domain in space.domains.items()}
    first = {name: values[0] for name, values in choices.items() if values}
    for name, values in choices.items():
        if name == "preset":  # its values would be those of the shared settings
            raise UserError("space: preset cannot be varied: vary the settings that it stands for, or compare presets")
        if name.partition(".")[0] in APART:
            raise UserError(f"space: {name} does not alter the result and cannot be varied; give it as an option")
        if len(values) > MOST_TRIALS:
            raise UserError(f"space: {name} has {len(values):,} values, of which {MOST_TRIALS:,} can be tried")
        for value in values:
            try:
                check({**first, name: value})
            except UserError as error:
                raise UserError(f"space: {error}") from None
    if len(constants(space.domains)) == len(space.domains):
        raise UserError("space: nothing is left to vary: every setting in it is given or constant")


def trials_of(order: Order, space: Space, settings: Experiment) -> list[Values]:
    """Draw distinct settings of the trials that are known beforehand; a small space may have fewer."""
    from raypkg.cluster.trials import draw_settings, grid, optuna

    if order.search == "grid":
        return list(grid(space.domains))
    if order.search == "optuna":  # it proposes a trial when one starts; the call shows whether it can
        optuna(space.domains, order.metric, order.mode, settings.seed, [])
        return []
    trials: list[Values] = []
    for number in range(order.samples):
        rng = np.random.default_rng(derive(settings.seed, "sweep", number))
        draws = (draw_settings(space.domains, rng) for _ in range(DRAWS))
        new = next((values for values in draws if values not in trials), None)
        if new is None:
            break
        trials.append(new)
    return trials


# Checks


def check_root(root: str) -> None:
    """Refuse credentials in the root of all runs."""
    if redacted(root) != root:
        advice = "leave them to the environment, such as AWS_ACCESS_KEY_ID"
        raise UserError(f"--root has credentials in it, which Ray Tune would keep in its own files: {advice}")


def base_of(schema: type[Settings], config: Path | None) -> dict[str, Any]:
    """Return the settings in a file, with an evaluation after every epoch unless it says otherwise."""
    base = read_toml(config) if config else {}
    train = base.get("train", {})
    if EVALUATE in dict(leaves(schema)) and isinstance(train, dict):
        base["train"] = {"evaluate_every_epochs": 1, **train}
    return base


def base_settings(table: Table, config: Path | None, values: Mapping[str, Any]) -> Experiment:
    """Return the settings that all rows share; refuse a given one in which rows or cases differ."""
    schema = training_settings_of(experiment[table.experiment])
    elsewhere = ["seed", *["train.lr"] * bool(table.rates)]
    parts = (*table.cases.values(), *table.rows.values(), elsewhere)
    varied = {name.removesuffix(".name") for part in parts for name in part}
    if given := next((name for name in values if name.removesuffix(".name") in varied), None):
        instead = "--seeds" if given == "seed" else "--rows and --cases"
        raise UserError(f"{given} is what the rows or cases of the table differ in and cannot be given: see {instead}")
    return resolve(schema, base_of(schema, config), {**table.shared, **values}, shared=True)


def check_comparison(table: Table, settings: Experiment) -> None:
    """Refuse a trial that a single run would refuse, or that would not measure the metric."""
    for name in table.after.values():
        imported("after function", name)
    for case, row, rate in product(table.cases, table.rows, table.rates or (None,)):
        try:
            trial = table.trial(case, row, table.seeds[0], rate)
            check_trial(HELD_OUT if table.rates else table.metric, settings, trial)
        except UserError as error:
            raise UserError(f"row {row!r}, case {case!r}: {error}") from None


def check_trial(metric: str, base: Experiment, values: Values) -> int:
    """Refuse settings of a trial that a single run would refuse, or with which no epoch would have the metric.

    Return the number of its training samples.
    """
    from raypkg.experiments.coreset_files import load_coreset

    trial = varied(base, values)
    check_names(trial)
    if METRICS[metric].held_out:
        if not trial.dataset.validation:
            raise UserError(f"metric {metric} is measured on held-out samples: dataset.validation = 0 holds out none")
        train: Training = trial.train  # type: ignore[attr-defined]  # every experiment declares its own
        every = train.evaluate_every_epochs
        if not 0 < every <= trial.epochs:
            raise UserError(f"metric {metric} would never be measured: {EVALUATE} = {every} of {trial.epochs} epochs")
    samples = samples_of(trial)
    n = len(samples.train_indices)
    given = getattr(trial, "coreset", None)
    if given is not None:
        n = len(load_coreset(given, samples, trial.dataset))
    trial.check(n, samples.data)
    return n


def check_data(study: Study, settings: Experiment) -> None:
    """Refuse to continue a study of other data, by the digests in the record or else in the runs of its trials."""
    known = study.known()
    digests = data_digests(settings, (values for _, values in known))
    for (number, _), digest in zip(known, digests, strict=True):
        run = study.run_storage(number)
        stored = study.trials[number].digest or (
            CONFIG in run.list() and read_settings(run).get("dataset", {}).get("digest")
        )
        if stored and stored != digest:
            problem = f"the data of {study.run_name(number)} are not those that it began with"
            raise UserError(f"{problem}: give another --name, or delete {study.name!r} and its trials")


def data_digests(base: Experiment, trials: Iterable[Values]) -> Iterator[str]:
    """Yield the digest of each trial's samples; a data set is opened once, or once for each seed that draws in it."""
    known: dict[tuple[str, int | None], str] = {}
    for values in trials:
        trial = varied(base, values)
        dataset = json.dumps(trial.dataset.model_dump(mode="json", exclude={"digest"}))
        key = dataset, trial.seed if trial.dataset.is_drawn else None
        if key not in known:
            known[key] = _opened(dataset, trial.seed).digest(trial.dataset)
        yield known[key]


def samples_of(settings: Experiment) -> Samples:
    """Return the samples of a trial; the last ones stay open."""
    return _opened(json.dumps(settings.dataset.model_dump(mode="json")), settings.seed)


@lru_cache(maxsize=2)
def _opened(dataset: str, seed: int) -> Samples:
    return open_samples(RunSettings(seed=seed, dataset=Dataset.model_validate_json(dataset)))


def _lasting(settings: Experiment) -> dict[str, Any]:
    return dotted(settings.model_dump(mode="json", exclude=set(APART)))

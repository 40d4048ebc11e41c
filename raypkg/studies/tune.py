"""``effray tune``: spaces, and studies whose trials are drawn from one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from raypkg.cluster.session import prepare
from raypkg.core.config import check_switches, first_problem, load_settings, with_current_names
from raypkg.core.errors import UserError, unknown
from raypkg.core.registry import Entry
from raypkg.core.seeds import derive
from raypkg.core.settings import APART, Experiment
from raypkg.experiments import training_settings_of
from raypkg.experiments.resolve import check_file_of_code, check_names, resolve
from raypkg.runs.show import terminal

from .driver import (
    MOST,
    Driver,
    base_of,
    check_counts,
    check_data,
    check_root,
    check_trial,
    data_digests,
    reopened,
    varied,
)
from .show import conclude, show_study
from .study import RECORD, SPACE, TO_THE_END, Order, Trial, Values, create_study
from .tables import METRICS, read_code, run_code, shipped_files

SPACES = "tune_spaces"
SAMPLES = 8  # trials
DRAWS = 1000  # attempts to draw settings that no other trial has
NAMES = {
    "mode": ("max", "min"),
    "scheduler": ("asha", "hyperband", "median", TO_THE_END),
    "search": ("random", "grid", "optuna"),
}
CHANGEABLE = ("concurrent", "time_budget")  # options of a resumed sweep
Asked = Mapping[str, Any]  # given options by their names in Order


def start_sweep(
    entry: Entry, asked: Asked, config: Path | None, values: Mapping[str, Any], name: str | None, root: str
) -> None:
    """Check everything, then run a new sweep; a mistake leaves no folder behind and starts no Ray.

    Settings in ``values`` win over those in the file ``config``. The default name is experiment and time.
    """
    check_root(root)
    schema = training_settings_of(entry)
    settings = resolve(schema, base_of(schema, config), values, shared=True)
    whole = open_space(asked["space"]) if "space" in asked else space_of(entry.name)
    space = without(whole, values)
    check_switches({**dict.fromkeys(space.domains), **values})  # a disabled part stays disabled in every trial
    order = order_of(entry.name, asked, space)

    def check(values: Values) -> None:
        if order.search == "optuna":  # trials are yet unknown: each value is tried as one
            check_trial(order.metric, settings, values)
        else:
            check_names(varied(settings, values))

    check_space(space, check)
    trials = trials_of(order, space, settings)
    for number, trial in enumerate(trials):
        try:
            check_trial(order.metric, settings, trial)
        except UserError as error:
            raise UserError(f"trial {number}: {error}") from None
    order = order.model_copy(update={"samples": len(trials) or order.samples})
    if name is None:
        name = f"{entry.name}-{time.strftime('%m%d-%H%M%S')}"
    digests = data_digests(settings, trials)
    known = [Trial(settings=values, digest=digest) for values, digest in zip(trials, digests, strict=True)]
    study = create_study(root, name, order, settings, space.text, known)
    with study.storage.locked(f"sweep {name!r}"):
        try:
            driver = Driver(study, settings, root, space.domains)
        except BaseException:  # no cluster, or one too small
            study.storage.delete_folder()
            raise
        driver.run()


def resume_sweep(entry: Entry, asked: Asked, name: str, values: Mapping[str, Any], root: str) -> None:
    """Run the trials of a sweep that are not done, perhaps with other ``CHANGEABLE`` options, cluster or tracker.

    A change that would alter its results is refused.
    """
    fixed = [f"--{option.replace('_', '-')}" for option in asked if option not in CHANGEABLE]
    fixed += [setting for setting in values if setting.partition(".")[0] not in APART]
    if fixed:
        others = "only --concurrent, --time-budget, cluster.* and track.*"
        raise UserError(f"--resume {name} keeps what was asked for: {fixed[0]} cannot change, {others}")
    check_counts(asked)
    study = reopened(root, name)
    path = study.storage.root
    if study.experiment != entry.name:
        raise UserError(f"sweep {name!r} is of {study.experiment}, not of {entry.name}")
    if study.order.table:
        raise UserError(f"{name!r} is a comparison: continue it with {study.command} --resume {name}")
    if study.order.scheduler == "none":
        raise UserError(f"{path}/{RECORD}: scheduler none is now called {TO_THE_END}")
    check_file_of_code(study.storage, SPACE)
    schema = training_settings_of(entry)
    settings = load_settings(schema, study.config, values)
    content = study.storage.read(SPACE)
    if not (content and content.strip()):
        raise UserError(f"{path}/{SPACE} is missing or empty: what was asked for is lost")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}/{SPACE} is corrupt: {error}") from None
    whole = read_space(text, f"{path}/{SPACE}")
    current = with_current_names(schema, whole.domains)
    domains = {name: domain for name, domain in current.items() if name in study.order.varied}
    check_data(study, settings)
    with study.storage.locked(f"sweep {name!r}"):
        study.change(settings, **asked)
        if study.left():
            Driver(study, settings, root, domains).run()
        else:
            conclude(study)
            show_study(study, terminal())


# Spaces


class Space(BaseModel):
    """Domains to draw settings from, and the metric to optimise."""

    text: str  # content of the file
    domains: dict[str, Any]  # Ray Tune's domains, or plain values, by dotted names of settings
    metric: str
    mode: str  # max or min


def space_of(experiment: str) -> Space:
    """Return the space with an experiment's name, or that of plain training."""
    return open_space(experiment if experiment in shipped_files(SPACES) else "train")


def open_space(name: str) -> Space:
    """Read a space by its name in ``tune_spaces`` or its path; a file of the working folder wins."""
    return read_space(*read_code("space", name, SPACES))


def read_space(text: str, origin: str) -> Space:
    """Run a space's file; refuse one that raises, that lacks a name, or from which nothing can be drawn."""
    prepare()  # before a space, or the next line, imports Ray Tune
    from raypkg.cluster.search import candidates, draw_settings

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


def without(space: Space, given: Iterable[str]) -> Space:
    """Return a space without the given settings (``model`` = ``model.name``); raise ``UserError`` if none is left."""
    fixed = {name.removesuffix(".name") for name in given}
    domains = {name: domain for name, domain in space.domains.items() if name.removesuffix(".name") not in fixed}
    if space.domains and not domains:
        raise UserError(f"nothing is left to vary: {', '.join(space.domains)} are given")
    return space.model_copy(update={"domains": domains})


def check_space(space: Space, check: Callable[[Values], None]) -> None:
    """Refuse a space with an unknown setting, with a value that its setting does not allow, or of one point.

    Each choice and both ends of each range are checked, with the first values of the other settings.
    """
    from raypkg.cluster.search import candidates, constants

    choices = {name: candidates(domain) for name, domain in space.domains.items()}
    first = {name: values[0] for name, values in choices.items() if values}
    for name, values in choices.items():
        if name == "preset":  # its values would be those of the shared settings
            raise UserError("space: preset cannot be varied: vary the settings that it stands for, or compare presets")
        if name.partition(".")[0] in APART:
            raise UserError(f"space: {name} does not alter the result and cannot be varied; give it as an option")
        if len(values) > MOST:
            raise UserError(f"space: {name} has {len(values):,} values, of which {MOST:,} can be tried")
        for value in values:
            try:
                check({**first, name: value})
            except UserError as error:
                raise UserError(f"space: {error}") from None
    if len(constants(space.domains)) == len(space.domains):
        raise UserError(f"space: there is nothing to vary, only {space.domains}")


def order_of(experiment: str, asked: Mapping[str, Any], space: Space) -> Order:
    """Return a request, its omitted options set to defaults; raise ``UserError`` if it cannot be carried out."""
    chosen = {"metric": space.metric, "scheduler": "asha", "search": "random", "samples": SAMPLES, **asked}
    metric, scheduler = chosen["metric"], chosen["scheduler"]
    if scheduler == "none":
        raise UserError(f"scheduler none is now called {TO_THE_END}")
    if metric in METRICS:
        chosen.setdefault("mode", space.mode if metric == space.metric else METRICS[metric].mode)
    for option, allowed in {"metric": METRICS, **NAMES}.items():
        if chosen[option] not in allowed:
            raise unknown(option, chosen[option], allowed)
    if scheduler != TO_THE_END and not METRICS[metric].each_epoch:
        problem = f"metric {metric} is known only at the end of a trial, so --scheduler {scheduler} could not act on it"
        raise UserError(f"{problem}: give --scheduler {TO_THE_END}, or --metric accuracy")
    check_counts(asked)
    if chosen["search"] == "grid" and "samples" in asked:
        raise UserError(f"--samples {asked['samples']}: a grid has as many trials as combinations")
    return Order(experiment=experiment, varied=[*space.domains], **chosen)


def trials_of(order: Order, space: Space, settings: Experiment) -> list[Values]:
    """Draw distinct settings of the trials that are known beforehand; a small space may have fewer."""
    from raypkg.cluster.search import draw_settings, grid, optuna

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

"""``effray tune``: a study whose trials are drawn from a space."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raypkg.core.config import check_switches, load_settings, with_current_names
from raypkg.core.errors import UserError
from raypkg.core.registry import Entry
from raypkg.core.settings import APART
from raypkg.experiments import training_settings_of
from raypkg.experiments.resolve import check_file_of_code, check_names, resolve
from raypkg.runs.show import terminal

from .driver import Driver, check_root, reopened
from .show import conclude, show_study
from .space import (
    base_of,
    check_counts,
    check_data,
    check_space,
    check_trial,
    data_digests,
    open_space,
    order_of,
    read_space,
    space_of,
    trials_of,
    varied,
    without,
)
from .study import RECORD, SPACE, TO_THE_END, Trial, Values, create_study

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

"""Tune spaces: files of Python code whose domains the trials of a sweep are drawn from."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from raypkg.cluster.session import prepare
from raypkg.core.config import first_problem
from raypkg.core.errors import UserError
from raypkg.core.seeds import derive
from raypkg.core.settings import APART, Experiment

from .study import MOST, Order, Values
from .tables import read_code, run_code, shipped_files

SPACES = "tune_spaces"
DRAWS = 1000  # attempts to draw settings that no other trial has


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
        if len(values) > MOST:
            raise UserError(f"space: {name} has {len(values):,} values, of which {MOST:,} can be tried")
        for value in values:
            try:
                check({**first, name: value})
            except UserError as error:
                raise UserError(f"space: {error}") from None
    if len(constants(space.domains)) == len(space.domains):
        raise UserError(f"space: there is nothing to vary, only {space.domains}")


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

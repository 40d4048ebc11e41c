"""Tune spaces: found by name or path, and checked against the settings before anything starts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from raypkg.cluster.session import prepare
from raypkg.core.errors import UserError, unknown
from raypkg.core.settings import APART

from .shipped import SPACES, SUFFIX, shipped_files

REQUIRED = ("space", "METRIC", "MODE")
MOST = 10_000  # trials of a sweep, as of a grid, and values of a setting: each is checked beforehand
ACTORS = "crest.actors"  # the room for them is that of all trials


@dataclass(frozen=True)
class Space:
    """What to draw settings from, and what to aim for.

    Attributes:
        text: of the file.
        domains: by dotted names of settings.
        metric: by which trials are compared.
        mode: max or min.
    """

    text: str
    domains: dict[str, Any]
    metric: str
    mode: str


def find_space(name: str) -> Path:
    """Return the file of a space: a path, or a name in ``tune_spaces`` of the working folder or of this package.

    Raises:
        UserError: there is none of that name, the nearest one named.
    """
    if name.endswith(SUFFIX):
        return Path(name)
    spaces = shipped_files(SPACES)
    if name not in spaces:
        raise unknown("space", name, spaces)
    return spaces[name]


def space_of(experiment: str) -> Space:
    """Return the space of an experiment's name, or, where it has none of its own, that of plain training."""
    return open_space(experiment if experiment in shipped_files(SPACES) else "train")


def open_space(name: str) -> Space:
    """Find a space and read it.

    Raises:
        UserError: there is none, it is no text, or as ``read_space``.
    """
    file = find_space(name)
    try:
        return read_space(file.read_text(), str(file))
    except FileNotFoundError:
        raise UserError(f"there is no space file {name!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(f"cannot read the space {str(file)!r}: {reason}") from None


def read_space(text: str, origin: str) -> Space:
    """Run a space's file.

    Args:
        text: of the file.
        origin: names it in errors.

    Raises:
        UserError: it raises, or lacks ``space()``, ``METRIC`` or ``MODE``, or nothing can be drawn from it.
    """
    prepare()  # a space imports Ray Tune
    content: dict[str, Any] = {"__name__": "space", "__file__": origin}
    try:
        exec(compile(text, origin, "exec"), content)
        if missing := next((name for name in REQUIRED if name not in content), None):
            raise UserError(f"space {origin!r} defines no {missing}")
        domains = dict(content["space"]())
        space = Space(text, domains, content["METRIC"], content["MODE"])
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # it is the user's code
        raise UserError(f"space {origin!r} raises {type(error).__name__}: {error}") from None
    _check_drawable(space, origin)
    return space


def without(space: Space, given: Iterable[str]) -> Space:
    """Return the space without the settings that the user gave; ``model`` and ``model.name`` are the same.

    Raises:
        UserError: nothing is left.
    """
    fixed = {name.removesuffix(".name") for name in given}
    left = [name for name in space.domains if name.removesuffix(".name") not in fixed]
    if space.domains and not left:
        raise UserError(f"nothing is left to vary: {', '.join(space.domains)} are given")
    domains = {name: space.domains[name] for name in left}
    return replace(space, domains=domains)


def check_space(space: Space, check: Callable[[dict[str, Any]], None]) -> None:
    """Refuse a space with an unknown setting, with a value that its setting does not allow, or of one point.

    Args:
        space: each choice and both ends of each range are tried, beside the first values of the other settings.
        check: refuses what a trial would set.

    Raises:
        UserError: what is wrong, as for any setting.
    """
    from raypkg.cluster.search import candidates, constants

    choices = {name: candidates(domain) for name, domain in space.domains.items()}
    first = {name: values[0] for name, values in choices.items() if values}
    for name, values in choices.items():
        part = name.partition(".")[0]
        if part in APART or name == ACTORS:
            raise UserError(f"space: {name} does not alter the result and cannot be varied; give it as an option")
        if len(values) > MOST:
            raise UserError(f"space: {name} has {len(values):,} values, of which {MOST:,} can be tried")
        for value in values:
            try:
                check({**first, name: value})
            except UserError as error:
                raise UserError(f"space: {error}") from None
    fixed = constants(space.domains)
    if len(fixed) == len(space.domains):
        raise UserError(f"space: there is nothing to vary, only {space.domains}")


def _check_drawable(space: Space, origin: str) -> None:
    from raypkg.cluster.search import candidates, draw_settings

    for name in (*space.domains, space.metric, space.mode):
        if not isinstance(name, str):
            raise UserError(f"space {origin!r}: {name!r} is not a name")
    for name, domain in space.domains.items():
        try:
            draw_settings({name: domain}, np.random.default_rng(0))
            candidates(domain)
        except (Exception, SystemExit) as error:  # Ray's own, and of a function that is the user's
            raise UserError(f"space {origin!r}: nothing can be drawn for {name}: {error}") from None

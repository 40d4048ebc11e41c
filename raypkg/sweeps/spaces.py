"""Tune spaces: found by name or path, and held against the settings before anything starts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import raypkg
from raypkg.core.errors import UserError, unknown
from raypkg.core.settings import APART

SUFFIX = ".py"
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
        UserError: there is none, the nearest one named.
    """
    if name.endswith(SUFFIX):
        if not Path(name).is_file():
            raise UserError(f"there is no space file {name!r}")
        return Path(name)
    installed = Path(raypkg.__file__).parent
    folders = [Path("tune_spaces"), installed / "tune_spaces", installed.parent / "tune_spaces"]
    found = {file.stem: file for folder in reversed(folders) for file in folder.glob(f"*{SUFFIX}")}
    if name not in found:
        raise unknown("space", name, found)
    return found[name]


def open_space(name: str) -> Space:
    """Find a space and read it.

    Raises:
        UserError: there is none, it is no text, or as ``read_space``.
    """
    file = find_space(name)
    try:
        return read_space(file.read_text(), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the space {str(file)!r}: {getattr(error, 'strerror', error)}") from None


def read_space(text: str, origin: str) -> Space:
    """Run a space's file.

    Args:
        text: of the file.
        origin: names it in errors.

    Raises:
        UserError: it raises, or lacks ``space()``, ``METRIC`` or ``MODE``, or nothing can be drawn from it.
    """
    content: dict[str, Any] = {"__name__": "space", "__file__": origin}
    try:
        exec(compile(text, origin, "exec"), content)
        if missing := [name for name in ("space", "METRIC", "MODE") if name not in content]:
            raise UserError(f"space {origin!r} defines no {missing[0]}")
        space = Space(text, dict(content["space"]()), content["METRIC"], content["MODE"])
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # it is the user's code
        raise UserError(f"space {origin!r} raises {type(error).__name__}: {error}") from None
    _check_drawable(space, origin)
    return space


def _check_drawable(space: Space, origin: str) -> None:
    from raypkg.cluster.trials import candidates, draw_settings

    for name in (*space.domains, space.metric, space.mode):
        if not isinstance(name, str):
            raise UserError(f"space {origin!r}: {name!r} is not a name")
    for name, domain in space.domains.items():
        try:
            draw_settings({name: domain}, np.random.default_rng(0))
            candidates(domain)
        except Exception as error:  # Ray's own, and of a function that is the user's
            raise UserError(f"space {origin!r}: nothing can be drawn for {name}: {error}") from None


def check_space(space: Space, check: Callable[[dict[str, Any]], None]) -> None:
    """Refuse a space with an unknown setting, with a value that its setting does not allow, or of one point.

    Args:
        space: each choice and both ends of each range are tried, beside the first values of the other settings.
        check: refuses what a trial would set.

    Raises:
        UserError: what is wrong, as for any setting.
    """
    from raypkg.cluster.trials import candidates, constants

    allowed = {name: candidates(domain) for name, domain in space.domains.items()}
    first = {name: values[0] for name, values in allowed.items() if values}
    for name, values in allowed.items():
        if name.partition(".")[0] in APART or name == ACTORS:
            raise UserError(f"space: {name} does not alter the result and cannot be varied; give it as an option")
        for value in values:
            try:
                check({**first, name: value})
            except UserError as error:
                raise UserError(f"space: {error}") from None
    if space.domains.keys() == constants(space.domains).keys():
        raise UserError(f"space: there is nothing to vary, only {space.domains}")

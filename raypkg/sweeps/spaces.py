"""Tune spaces: found by name or path, and held against the settings before anything starts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import raypkg
from raypkg.core.config import Settings, load
from raypkg.core.errors import UserError, unknown

SUFFIX = ".py"
NOT_SWEPT = ("cluster.", "track.")  # they do not alter the result, and decide how trials run


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


def read_space(text: str, origin: str) -> Space:
    """Run a space's file.

    Args:
        text: of the file.
        origin: names it in errors.

    Raises:
        UserError: it raises, or lacks ``space()``, ``METRIC`` or ``MODE``, or the space is empty.
    """
    content: dict[str, Any] = {"__name__": "space", "__file__": origin}
    try:
        exec(compile(text, origin, "exec"), content)
        domains = content["space"]()
        space = Space(text, dict(domains), content["METRIC"], content["MODE"])
    except KeyError as error:
        if error.args[0] in ("space", "METRIC", "MODE"):
            raise UserError(f"space {origin!r} defines no {error.args[0]}") from None
        raise UserError(f"space {origin!r} raises KeyError: {error}") from None
    except Exception as error:  # it is the user's code
        raise UserError(f"space {origin!r} raises {type(error).__name__}: {error}") from None
    if not space.domains:
        raise UserError(f"space {origin!r} is empty: space() returns nothing to vary")
    return space


def check_space(schema: type[Settings], base: Settings, space: Space, check: Callable[[Any], None]) -> None:
    """Refuse a space with an unknown setting, or with a value that its setting does not allow.

    Args:
        schema: of the settings.
        base: settings that all trials share.
        space: each choice and both ends of each range are tried, one setting at a time.
        check: refuses settings whose names do not exist.

    Raises:
        UserError: what is wrong, as for any setting.
    """
    from raypkg.cluster.tune import candidates

    for name, domain in space.domains.items():
        if name.startswith(NOT_SWEPT):
            raise UserError(f"space: {name} does not alter the result and cannot be varied; give it as an option")
        for value in candidates(domain):
            check_trial("space", schema, base, {name: value}, check)


def check_trial(
    what: str, schema: type[Settings], base: Settings, values: Mapping[str, Any], check: Callable[[Any], None]
) -> None:
    """Refuse settings that a single run would refuse, and say of what they are."""
    try:
        check(load(schema, base.model_dump(mode="json"), values))
    except UserError as error:
        raise UserError(f"{what}: {error}") from None

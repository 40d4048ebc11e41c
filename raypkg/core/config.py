"""Typed, frozen, nested settings: defaults → TOML file → dotted overrides, and errors in one line.

A leaf has one dotted name everywhere (``select.fraction``): in the TOML file, on the command line, in tune spaces and
in the stored ``config.toml``. A part with a ``name`` may be given by that name alone: ``model = "resnet20"``.
"""

import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from .errors import UserError, unknown


class Settings(BaseModel):
    """Base of every settings class: frozen, no unknown keys, finite numbers, defaults checked as well."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class Named(Settings):
    """A part that chooses something by name, with the chosen thing's own options."""

    name: str
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


S = TypeVar("S", bound=Settings)


def load_settings(
    schema: type[S], base: Path | Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None
) -> S:
    """Build settings from defaults, a TOML file (or what was read from one) and dotted overrides.

    Raises:
        UserError: unreadable or malformed file, unknown key, wrong type, value out of range.
    """
    values = read_toml(base) if isinstance(base, Path) else dict(base or {})
    for name, value in (overrides or {}).items():
        _place(values, name.split("."), value)
    return validate(schema, values)


def validate(schema: type[S], values: Mapping[str, Any], prefix: str = "") -> Any:
    """Return ``schema(**values)``, turning the first thing wrong into a one-line ``UserError``."""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise _explain(schema, error.errors()[0], prefix) from None


def leaves(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every leaf setting as (dotted name, field), in the order of the class.

    >>> class Optim(Settings):
    ...     lr: float = 0.1
    >>> class Example(Settings):
    ...     seed: int = 0
    ...     optim: Optim = Optim()
    >>> [name for name, _ in leaves(Example)]
    ['seed', 'optim.lr']
    """
    for name, field in schema.model_fields.items():
        part = part_of(field)
        if part:
            yield from leaves(part, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def part_of(field: FieldInfo) -> type[Settings] | None:
    """Return the nested settings class of a field, or None for a leaf."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def to_toml(settings: Settings) -> str:
    """Return the settings as TOML that ``load`` reads back to an equal object."""
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))


def read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UserError: it cannot be read, or is not TOML.
    """
    try:
        return parse_toml(file.read_text(), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the settings file {str(file)!r}: {getattr(error, 'strerror', error)}") from None


def parse_toml(text: str, origin: str) -> dict[str, Any]:
    """Read TOML; ``origin`` names it in the error."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{origin!r} is not valid TOML: {error}") from None


def _place(values: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        inner = values.get(key, {})
        if not isinstance(inner, str | dict):
            raise UserError(f"{key} = {inner!r} is given, so {'.'.join(path)} cannot be")
        values[key] = values = {"name": inner} if isinstance(inner, str) else dict(inner)
    values[path[-1]] = value


def _explain(schema: type[BaseModel], error: Mapping[str, Any], prefix: str) -> UserError:
    path = [str(step) for step in error["loc"]]
    where = prefix + ".".join(path)
    if error["type"] == "extra_forbidden":
        siblings = _part_at(schema, path[:-1])
        return unknown(f"{prefix or 'setting '}".strip(), ".".join(path), [".".join([*path[:-1], s]) for s in siblings])
    field = _field_at(schema, path)
    allowed = typing.get_args(field.annotation) if field else ()
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        return unknown(where, error["input"], map(str, allowed))
    reason = error["msg"][0].lower() + error["msg"][1:]
    return UserError(f"{where} = {error['input']!r}: {reason}" if where else reason)


def _part_at(schema: type[BaseModel], path: list[str]) -> Mapping[str, FieldInfo]:
    for step in path:
        schema = part_of(schema.model_fields[step]) or schema
    return schema.model_fields


def _field_at(schema: type[BaseModel], path: list[str]) -> FieldInfo | None:
    if not path:
        return None
    return _part_at(schema, [step for step in path[:-1] if not step.isdigit()]).get(path[-1])

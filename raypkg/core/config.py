"""Typed, frozen, nested settings: defaults → TOML file → dotted overrides, and errors in one line.

A leaf has one dotted name everywhere (``select.fraction``): in the TOML file, on the command line, in tune spaces and
in the stored ``config.toml``. A part with a ``name`` may be given by that name alone: ``model = "resnet20"``. What may
be left out is switched off by ``false``; an optional part is switched on, with its defaults, by ``true``.
"""

import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from .errors import UserError, shown, unknown

DEEPEST = 32  # parts of a name, and values within values: far more than any setting has, far fewer than Python follows
LARGEST = 2**63 - 1  # the largest integer of TOML, of parquet and of PyTorch


class Settings(BaseModel):
    """Base of every settings class: frozen, no unknown keys, finite numbers, defaults checked as well.

    An integer may be written 1.0, as searchers of tune spaces do; a switch is never a number, nor a number a switch.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, serialize_by_alias=True
    )
    renamed: ClassVar[Mapping[str, str]] = {}  # names that settings once had → those they have now

    @model_validator(mode="before")
    @classmethod
    def _switch(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        fields = fields_of(cls)
        return {name: _switched(name, fields.get(name), value) for name, value in values.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _is_not_confused(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for a number, and a number for them: Python takes the one for the other."""
        kinds = set(_kinds(cls.model_fields[info.field_name or ""].annotation))
        numbers = kinds & {int, float}
        items = value if isinstance(value, list | tuple) else [value]
        if numbers and bool not in kinds and any(isinstance(item, bool) for item in items):
            raise PydanticCustomError("number", "input should be a number, neither true nor false")
        if bool in kinds and not numbers and isinstance(value, int | float) and not isinstance(value, bool):
            raise PydanticCustomError("switch", "input should be true or false, not a number")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _is_not_too_large(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise PydanticCustomError("size", "input should be an integer of at most 64 bits")
        return value


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
    overrides = overrides or {}
    check_switches(overrides)
    for name, value in overrides.items():
        path = name.split(".")
        if len(path) > DEEPEST:
            raise UserError(f"unknown setting {name!r}: no setting has {len(path)} parts")
        _place(values, path, value)
    return validate(schema, values)


def validate(schema: type[S], values: Mapping[str, Any], prefix: str = "") -> S:
    """Return ``schema(**values)``, turning the first thing wrong into a one-line ``UserError``."""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise _explain(schema, error.errors()[0], prefix) from None


def fields_of(schema: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a settings class by the names that users give them.

    A word that Python keeps for itself is the alias of a field: ``train.from`` is ``from_`` in the class.
    """
    return {field.alias or name: field for name, field in schema.model_fields.items()}


def leaves(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting as (dotted name, field), in the order of the class: leaves, and optional parts as such.

    >>> class Optim(Settings):
    ...     lr: float = 0.1
    >>> class Example(Settings):
    ...     seed: int = 0
    ...     optim: Optim | None = None
    >>> [name for name, _ in leaves(Example)]
    ['seed', 'optim', 'optim.lr']
    """
    for name, field in fields_of(schema).items():
        part = part_of(field)
        if part is None:
            yield f"{prefix}{name}", field
            continue
        if may_be_none(field) and not issubclass(part, Named):  # that one is switched by its name
            yield f"{prefix}{name}", field
        yield from leaves(part, f"{prefix}{name}.")


def part_of(field: FieldInfo) -> type[Settings] | None:
    """Return the nested settings class of a field, optional or not; None for a leaf."""
    for kind in alternatives(field):
        if isinstance(kind, type) and issubclass(kind, Settings):
            return kind
    return None


def is_list(field: FieldInfo) -> bool:
    """Say whether a setting is a list."""
    return any(typing.get_origin(kind) is tuple for kind in alternatives(field))


def may_be_none(field: FieldInfo) -> bool:
    """Say whether a setting may be left out, or switched off."""
    return NoneType in alternatives(field)


def current_name(schema: type[Settings], name: str) -> str | None:
    """Return what a setting that has been renamed is called now, or None for any other name.

    >>> class Optim(Settings):
    ...     renamed = {"rate": "lr"}
    ...     lr: float = 0.1
    >>> class Example(Settings):
    ...     renamed = {"opt": "optim"}
    ...     optim: Optim = Optim()
    >>> current_name(Example, "opt.rate"), current_name(Example, "optim.lr")
    ('optim.lr', None)
    """
    part: type[Settings] | None = schema
    path = []
    for step in name.split("."):
        now = part.renamed.get(step, step) if part else step
        path.append(now)
        field = fields_of(part).get(now) if part else None
        part = part_of(field) if field else None
    current = ".".join(path)
    return None if current == name else current


def with_current_names(schema: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that an earlier version stored, nested or by dotted names, by their current names.

    >>> class Optim(Settings):
    ...     renamed = {"rate": "lr"}
    ...     lr: float = 0.1
    >>> class Example(Settings):
    ...     optim: Optim = Optim()
    >>> with_current_names(Example, {"optim": {"rate": 0.3}}), with_current_names(Example, {"optim.rate": 0.3})
    ({'optim': {'lr': 0.3}}, {'optim.lr': 0.3})
    """
    current = {}
    for name, value in values.items():
        now = current_name(schema, name) or name
        field = fields_of(schema).get(now)
        part = part_of(field) if field else None
        current[now] = with_current_names(part, value) if part and isinstance(value, Mapping) else value
    return current


def load_stored(schema: type[S], stored: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> S:
    """Build settings from those that a run or a study stored, perhaps by former names, and dotted overrides.

    Raises:
        UserError: unknown key, wrong type, value out of range.
    """
    return load_settings(schema, with_current_names(schema, stored), overrides)


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names.

    >>> dotted({"seed": 0, "select": {"rule": "craig", "target": {"name": "valid"}}})
    {'seed': 0, 'select.rule': 'craig', 'select.target.name': 'valid'}
    """
    by_name: dict[str, Any] = {}
    for name, value in values.items():
        by_name |= dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return by_name


def to_toml(settings: Settings) -> str:
    """Return the settings as TOML that ``load_settings`` reads back to an equal object.

    Raises:
        UserError: open options hold what TOML cannot: None, objects, broken Unicode, integers of more than 64 bits.
    """
    try:
        plain = _plain(settings)
        _check_size(plain, "a setting")
        text = tomli_w.dumps(plain)
        text.encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"the settings cannot be stored: {error}") from None
    return text


def read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UserError: it cannot be read, or is not TOML.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the settings file {str(file)!r}: {error.strerror}") from None
    return parse_toml(content, str(file))


def parse_toml(text: str | bytes, origin: str) -> dict[str, Any]:
    """Read TOML.

    Args:
        text: or its bytes in UTF-8.
        origin: names it in the error.

    Raises:
        UserError: it is no TOML, or has values too large or too deep for anything that could be set.
    """
    try:
        values = tomllib.loads(text.decode() if isinstance(text, bytes) else text)
    except ValueError as error:  # of TOML, of UTF-8, or of an integer of thousands of digits
        raise UserError(f"{origin!r} is not valid TOML: {error}") from None
    except RecursionError:
        raise UserError(f"{origin!r} is not valid TOML: its brackets are nested too deeply") from None
    _check_size(values, repr(origin))
    return values


def alternatives(field: FieldInfo) -> tuple[Any, ...]:
    """Return the types that a field allows: those of a union, or its one."""
    kind = field.annotation
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, UnionType) else (kind,)


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield the plain types that an annotation allows, those of a list's items among them."""
    if typing.get_origin(annotation) is typing.Annotated:
        yield from _kinds(typing.get_args(annotation)[0])
    elif typing.get_origin(annotation) in (typing.Union, UnionType, tuple):
        for inner in typing.get_args(annotation):
            yield from _kinds(inner)
    else:
        yield annotation


def _check_size(values: Any, origin: str) -> None:
    """Refuse values within values without end, and integers that TOML does not have."""
    level = [values]
    for _ in range(DEEPEST):
        if any(isinstance(value, int) and abs(value) > LARGEST for value in level):
            raise UserError(f"{origin} has an integer of more than 64 bits")
        level = [inner for value in level for inner in _values_in(value)]
    if level:
        raise UserError(f"{origin} has values nested more than {DEEPEST} deep")


def _values_in(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _switched(name: str, field: FieldInfo | None, value: Any) -> Any:
    """Return a value in the form of its field.

    What is switched off becomes None, what is switched on an empty part, and a text for a list its items.
    """
    if field is None:
        return value
    optional = may_be_none(field) and bool not in alternatives(field)
    chosen = value.get("name") if isinstance(value, Mapping) else value
    if optional and _is_off(chosen):
        return None
    if optional and chosen == "none":
        raise UserError(f"{name} = none is now called false")
    if optional and _is_on(value) and part_of(field):
        return {}
    if is_list(field) and isinstance(value, str):
        return [item for item in value.split(",") if item]
    return value


def check_switches(overrides: Mapping[str, Any]) -> None:
    """Refuse settings within a part that is switched off beside them."""
    for name, value in overrides.items():
        part = name.removesuffix(".name")
        inner = [other for other in overrides if other.startswith(f"{part}.") and other != name]
        if inner and _is_off(value):
            raise UserError(f"{part} = false: {inner[0]} would do nothing")


def _is_on(value: Any) -> bool:
    return value is True or value == "true"  # not 1, which equals True


def _is_off(value: Any) -> bool:
    return value is False or value == "false"


def _plain(settings: Settings) -> dict[str, Any]:
    """Return what TOML can hold: nothing for None, but ``false`` where that is not the default."""
    plain: dict[str, Any] = {}
    dumped = settings.model_dump(mode="json")
    values = [value for _, value in settings]  # in the order of the fields
    for (name, field), value in zip(fields_of(type(settings)).items(), values, strict=True):
        if isinstance(value, Settings):
            plain[name] = _plain(value)
        elif value is not None:
            if name in dumped:  # a class may leave out what is switched off
                plain[name] = dumped[name]
        elif field.get_default(call_default_factory=True) is not None:
            plain[name] = False
    return plain


def _place(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set the value of a dotted name, making a part of whatever stands in its way."""
    *parts, last = path
    for key in parts:
        inner = values.get(key)
        if inner is None or _is_on(inner) or _is_off(inner):
            part = {}
        elif isinstance(inner, str):
            part = {"name": inner}
        elif isinstance(inner, dict):
            part = dict(inner)
        else:
            raise UserError(f"{key} = {shown(inner)} is given, so {'.'.join(path)} cannot be")
        values[key] = part
        values = part
    values[last] = value


def _explain(schema: type[Settings], error: Mapping[str, Any], prefix: str) -> UserError:
    path = [str(step) for step in error["loc"]]
    name = ".".join(path)
    where = prefix + name
    if error["type"] == "extra_forbidden":
        if now := current_name(schema, name):
            return UserError(f"{where} is now called {prefix}{now}")
        siblings = [".".join([*path[:-1], sibling]) for sibling in _fields_at(schema, path[:-1])]
        return unknown(f"{prefix or 'setting '}".strip(), name, siblings)
    field = _field_at(schema, path)
    if error["type"] == "literal_error" and isinstance(error["input"], str) and field:
        return unknown(where, error["input"], _literals(field))
    reason = error["msg"][0].lower() + error["msg"][1:]
    return UserError(f"{where} = {shown(error['input'])}: {reason}" if where else reason)


def _literals(field: FieldInfo) -> list[str]:
    """Return the names that a field allows, and what switches it off."""
    names = [str(name) for kind in alternatives(field) for name in typing.get_args(kind)]
    return [*names, "false"] if may_be_none(field) else names


def _fields_at(schema: type[BaseModel], path: list[str]) -> Mapping[str, FieldInfo]:
    for step in path:
        if not step.isdigit():  # the place in a list
            field = fields_of(schema)[step]
            schema = part_of(field) or _part_of_list(field) or schema
    return fields_of(schema)


def _part_of_list(field: FieldInfo) -> type[Settings] | None:
    """Return the settings class of a list's items, if they have one."""
    items = [item for kind in alternatives(field) for item in typing.get_args(kind)]
    return next((item for item in items if isinstance(item, type) and issubclass(item, Settings)), None)


def _field_at(schema: type[BaseModel], path: list[str]) -> FieldInfo | None:
    if not path:
        return None
    part = [step for step in path[:-1] if not step.isdigit()]
    return _fields_at(schema, part).get(path[-1])

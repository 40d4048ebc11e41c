"""Typed, frozen, nested settings: defaults → TOML file → dotted overrides, with errors in one line.

Every setting has one dotted name (``select.fraction``): in the TOML file, on the command line, in tune spaces and in
the stored ``config.toml``. A part with a ``name`` may be given by that name alone: ``model = "resnet20"``. Set an
optional part to ``false`` to disable it, to ``true`` to enable it with its defaults.
"""

import errno
import stat
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from .errors import UserError, shown, unknown

DEEPEST = 32  # parts of a name, and nested values: far more than settings have, far fewer than Python's stack
LARGEST = 2**63 - 1  # the largest integer of TOML, parquet and PyTorch


class Settings(BaseModel):
    """Base of every settings class: frozen, no unknown keys, finite numbers, validated defaults.

    An integer may be written 1.0, as searchers of tune spaces do. A boolean is never a number, nor the reverse.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, serialize_by_alias=True
    )
    renamed: ClassVar[Mapping[str, str]] = {}  # former name of a setting → current name
    removed: ClassVar[Mapping[str, Any]] = {}  # former setting → the value that stored files may have, ... = any
    former: ClassVar[Mapping[str, Any]] = {}  # defaults before there were presets, where they have changed

    @model_validator(mode="before")
    @classmethod
    def _convert(cls, values: Any) -> Any:
        """Give values the form of their fields: None for a disabled part, defaults for an enabled one, lists."""
        if not isinstance(values, Mapping):
            return values
        converted = dict(values)
        for name, field in fields_of(cls).items():
            if name not in values:
                continue
            value = values[name]
            optional = NoneType in alternatives(field) and bool not in alternatives(field)
            chosen = value.get("name") if isinstance(value, Mapping) else value
            if optional and _is_off(chosen):
                converted[name] = None
            elif optional and _is_on(value) and part_of(field):
                converted[name] = {}
            elif is_list(field) and isinstance(value, str):
                converted[name] = [item for item in value.split(",") if item]
        return converted

    @field_validator("*", mode="before")
    @classmethod
    def _check_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a boolean for a number and a number for a boolean; pydantic takes one for the other."""
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
    def _check_size(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise PydanticCustomError("size", "input should be an integer of at most 64 bits")
        return value

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """Return the values by name, with pydantic's options, without those that are not stored."""
        # Serializers of pydantic would turn Ctrl-C inside them into an error.
        values = super().model_dump(**options)
        self._leave_out(values)
        return values

    def _leave_out(self, values: dict[str, Any]) -> None:
        """Remove values that are not stored, also of the parts."""
        for name, part in self:
            if isinstance(part, Settings) and isinstance(values.get(name), dict):
                part._leave_out(values[name])


class Named(Settings):
    """A part that chooses an entry of a registry by name, with the entry's own options."""

    name: str
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


S = TypeVar("S", bound=Settings)


def load_settings(
    schema: type[S], base: Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None
) -> S:
    """Build settings from defaults, nested values and dotted overrides; the first error is one line."""
    values = dict(base or {})
    overrides = overrides or {}
    check_switches(overrides)
    for name, value in overrides.items():
        path = name.split(".")
        if len(path) > DEEPEST:
            raise UserError(f"unknown setting {name!r}: no setting has {len(path)} parts")
        around = values
        for key in path[:-1]:
            # A shorthand on the way is replaced by the part that it stands for.
            inner = around.get(key)
            if isinstance(inner, str) and not (_is_on(inner) or _is_off(inner)):
                inner = {"name": inner}
            around[key] = dict(inner) if isinstance(inner, dict) else {}
            around = around[key]
        around[path[-1]] = value
    return validate(schema, values)


def changed(settings: S, values: Mapping[str, Any]) -> S:
    """Return settings with other values, by dotted names, validated again."""
    return load_settings(type(settings), settings.model_dump(), values) if values else settings


def load_stored(schema: type[S], stored: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> S:
    """Build settings from the stored ones of a run or study, possibly of an earlier version, and dotted overrides."""
    return load_settings(schema, stored_values(schema, stored), overrides)


def stored_values(schema: type[Settings], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return stored settings, not yet validated, under their current names and with the defaults of their time."""
    return with_current_names(schema, stored, former="preset" in schema.model_fields and "preset" not in stored)


def validate(schema: type[S], values: Mapping[str, Any], prefix: str = "") -> S:
    """Return ``schema(**values)``; the first error becomes a one-line ``UserError``."""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise one_line(schema, error, prefix) from None


def check_switches(overrides: Mapping[str, Any]) -> None:
    """Refuse overrides within a part that another override disables."""
    for name, value in overrides.items():
        part = name.removesuffix(".name")
        inner = [other for other in overrides if other.startswith(f"{part}.") and other != name]
        if inner and _is_off(value):
            raise UserError(f"{part} = false: {inner[0]} would do nothing")


def _is_on(value: Any) -> bool:
    return value is True or value == "true"  # 1 equals True but enables nothing


def _is_off(value: Any) -> bool:
    return value is False or value == "false"


# The fields of settings classes


def fields_of(schema: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a settings class by their names for users: ``train.from`` is ``from_`` in the class."""
    return {field.alias or name: field for name, field in schema.model_fields.items()}


def leaves(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting as (dotted name, field) in the order of the class, optional parts before their settings.

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
        if NoneType in alternatives(field) and not issubclass(part, Named):  # a Named part is disabled by its name
            yield f"{prefix}{name}", field
        yield from leaves(part, f"{prefix}{name}.")


def part_of(field: FieldInfo) -> type[Settings] | None:
    """Return the nested settings class of a field, also of an optional one, or None for a leaf."""
    return next((kind for kind in alternatives(field) if isinstance(kind, type) and issubclass(kind, Settings)), None)


def _part_named(schema: type[Settings] | None, name: str) -> type[Settings] | None:
    field = fields_of(schema).get(name) if schema else None
    return part_of(field) if field else None


def is_list(field: FieldInfo) -> bool:
    """Return True if a setting is a list."""
    return any(typing.get_origin(kind) is tuple for kind in alternatives(field))


def alternatives(field: FieldInfo) -> tuple[Any, ...]:
    """Return the types that a field allows: the members of a union, or its only type."""
    kind = field.annotation
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, UnionType) else (kind,)


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield the plain types that an annotation allows, and those of a list's items."""
    if typing.get_origin(annotation) is typing.Annotated:
        yield from _kinds(typing.get_args(annotation)[0])
    elif typing.get_origin(annotation) in (typing.Union, UnionType, tuple):
        for inner in typing.get_args(annotation):
            yield from _kinds(inner)
    else:
        yield annotation


def current_name(schema: type[Settings], name: str) -> str | None:
    """Return the current name of a renamed setting, or None for any other name.

    >>> class Optim(Settings):
    ...     renamed = {"rate": "lr"}
    ...     lr: float = 0.1
    >>> current_name(Optim, "rate"), current_name(Optim, "lr")
    ('lr', None)
    """
    part: type[Settings] | None = schema
    path = []
    for step in name.split("."):
        path.append(part.renamed.get(step, step) if part else step)
        part = _part_named(part, path[-1])
    current = ".".join(path)
    return None if current == name else current


def with_current_names(schema: type[Settings], values: Mapping[str, Any], *, former: bool = False) -> dict[str, Any]:
    """Return stored settings of an earlier version, nested or by dotted names, under their current names.

    ``former`` completes settings from before there were presets by the defaults of that time.
    """
    current = {}
    for name, value in ({**schema.former, **values} if former else values).items():
        if name in schema.removed and schema.removed[name] in (value, ...):
            continue
        now = current_name(schema, name) or name
        part = _part_named(schema, now)
        if part and former and _is_on(value):
            value = {}
        current[now] = value
        if part and isinstance(value, Mapping):
            current[now] = with_current_names(part, value, former=former)
    return current


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names.

    >>> dotted({"seed": 0, "select": {"rule": "craig", "target": {"name": "valid"}}})
    {'seed': 0, 'select.rule': 'craig', 'select.target.name': 'valid'}
    """
    by_name: dict[str, Any] = {}
    for name, value in values.items():
        by_name |= dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return by_name


# TOML


def to_toml(settings: Settings) -> str:
    """Return the settings as TOML that ``load_settings`` reads back to an equal object.

    Options that TOML cannot hold are refused: None, objects, broken Unicode, integers of more than 64 bits.
    """
    try:
        plain = _plain(settings)
        _check_values(plain, "a setting")
        text = tomli_w.dumps(plain)
        text.encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"the settings cannot be stored: {error}") from None
    return text


def _plain(settings: Settings) -> dict[str, Any]:
    """Return values for TOML: None is omitted, or ``false`` if it is not the default."""
    plain = settings.model_dump(mode="json")
    for (name, field), (_, value) in zip(fields_of(type(settings)).items(), settings, strict=True):
        if isinstance(value, Settings):
            plain[name] = _plain(value)
        elif value is None and field.get_default(call_default_factory=True) is not None:
            plain[name] = False
        elif value is None:
            plain.pop(name, None)
    return plain


def regular(file: str | Path) -> Path:
    """Return the path of a regular file; raise ``OSError`` for others: a pipe may block forever, a device never end."""
    path = Path(file)
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(file))
    return path


def read_toml(file: Path) -> dict[str, Any]:
    """Return the values of a TOML file."""
    try:
        content = regular(file).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the settings file {str(file)!r}: {error.strerror}") from None
    return parse_toml(content, str(file))


def parse_toml(text: str | bytes, origin: str) -> dict[str, Any]:
    """Return the values of TOML, named ``origin`` in errors; refuse values larger or deeper than any setting."""
    try:
        values = tomllib.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except ValueError as error:  # of TOML, of UTF-8, or of an integer of thousands of digits
        raise UserError(f"{origin!r} is not valid TOML: {error}") from None
    except RecursionError:
        raise UserError(f"{origin!r} is not valid TOML: its brackets are nested too deeply") from None
    _check_values(values, repr(origin))
    return values


def _check_values(values: Any, origin: str) -> None:
    """Refuse integers of more than 64 bits, and values nested too deeply."""
    level = [values]
    for _ in range(DEEPEST):
        if any(isinstance(value, int) and abs(value) > LARGEST for value in level):
            raise UserError(f"{origin} has an integer of more than 64 bits")
        containers = [list(value.values()) if isinstance(value, dict) else value for value in level]
        level = [inner for value in containers if isinstance(value, list) for inner in value]
    if level:
        raise UserError(f"{origin} has values nested more than {DEEPEST} deep")


def one_line(schema: type[Settings], invalid: ValidationError, prefix: str = "") -> UserError:
    """Return the first validation error of pydantic in one line."""
    error = invalid.errors()[0]
    path = [str(step) for step in error["loc"]]
    name = ".".join(path)
    around: type[Settings] = schema  # the class of the invalid setting
    for step in path[:-1]:
        if not step.isdigit():  # a position in a list
            field = fields_of(around).get(step)  # None: within a mapping
            kinds = _kinds(field.annotation) if field else ()
            around = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)), around)
    if error["type"] == "extra_forbidden":
        if now := current_name(schema, name):
            return UserError(f"{prefix}{name} is now called {prefix}{now}")
        siblings = [".".join([*path[:-1], sibling]) for sibling in fields_of(around)]
        return unknown(f"{prefix or 'setting '}".strip(), name, siblings)
    field = fields_of(around).get(path[-1]) if path else None
    if error["type"] == "literal_error" and isinstance(error["input"], str) and field:
        names = [str(name) for kind in alternatives(field) for name in typing.get_args(kind)]
        return unknown(prefix + name, error["input"], [*names, "false"] if NoneType in alternatives(field) else names)
    return UserError(prefix + first_problem(invalid))


def first_problem(invalid: ValidationError) -> str:
    """Return the first validation error of pydantic: the value's place, the value, and what is allowed."""
    error = invalid.errors()[0]
    place = ".".join(map(str, error["loc"]))
    reason = error["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    return f"{place} = {shown(error['input'])}: {reason}" if place else reason

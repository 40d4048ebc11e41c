"""Settings as command-line options: one option per leaf, grouped by part, named as everywhere else."""

import typing
from collections.abc import Iterable, Mapping
from typing import Any

import click
from pydantic.fields import FieldInfo

from raypkg.core.config import Settings, alternatives, current_name, is_list, leaves, parse_toml, part_of
from raypkg.core.errors import UserError, shown
from raypkg.core.settings import APART

from .options import ExampleHelp


class SettingsCommand(ExampleHelp):
    """A command whose options are settings, grouped by part in its help; a name that is old is told its new one.

    Args:
        schema: of the settings.
    """

    def __init__(self, *arguments: Any, schema: type[Settings], **options: Any):
        super().__init__(*arguments, **options)
        self.schema = schema

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Parse the command line."""
        try:
            return super().parse_args(context, arguments)
        except click.NoSuchOption as error:
            old = error.option_name.lstrip("-").replace("-", "_")
            if now := current_name(self.schema, old):
                raise UserError(f"{error.option_name} is now called --{now}") from None
            raise

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for the run and one for each part of the settings."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record and isinstance(parameter, click.Option):  # an argument stands in the usage line
                part, dot, _ = (parameter.name or "").partition("__")
                sections.setdefault(part if dot else "run", []).append(record)
        for part in sorted(sections, key=APART.__contains__):  # where it runs comes last
            with formatter.section(part):
                formatter.write_dl(sections[part])


def setting_options(schema: type[Settings]) -> Iterable[click.Option]:
    """Make one option for every leaf but the open ``options`` tables; ``--model`` is short for ``--model.name``.

    An optional part is an option too: ``--agent`` switches it on with its defaults.
    """
    for name, field in leaves(schema):
        if name.rpartition(".")[2] == "options":
            continue
        short = [f"--{name.removesuffix('.name')}"] if name.endswith(".name") else []
        switch: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if part_of(field) else {}
        yield click.Option(
            [*short, f"--{name}", name.replace(".", "__")],
            metavar=metavar(field),
            help=f"{field.description or ''}{_default(field)}",
            multiple=is_list(field),
            **switch,
        )


def overrides(schema: type[Settings], given: Mapping[str, Any], pairs: Iterable[str]) -> dict[str, Any]:
    """Return the dotted settings that the user gave, as options and as ``--set`` pairs, lists split at commas."""
    texts = {}
    for name, text in given.items():
        if isinstance(text, tuple):  # an option that may be repeated
            text = ",".join(text) if text else None
        if text is not None:
            texts[name.replace("__", ".")] = text
    texts |= dict(_split(pairs))
    fields = dict(leaves(schema))
    values = {}
    for name, text in texts.items():
        values[name] = _parse(text) if name in fields else _value(text)
    return values


def parsed_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Return KEY=VALUE texts as a dictionary of TOML values."""
    return {name: _value(text) for name, text in _split(pairs)}


def _split(pairs: Iterable[str]) -> Iterable[tuple[str, str]]:
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not (name and equals):
            raise UserError(f"--set {shown(pair)} is not of the form KEY=VALUE")
        yield name.strip(), text.strip()


def _parse(text: str) -> Any:
    """Read a list or a table; any other text the settings bring into the form of their field."""
    return _value(text) if text.startswith(("[", "{")) else text


def _value(text: str) -> Any:
    """Read one TOML value; what is none is a string."""
    try:
        values = parse_toml(f"value = {text}", text)
    except UserError:
        return text
    return values["value"] if len(values) == 1 else text  # no line after it sets something else


def metavar(field: FieldInfo) -> str:
    """Return what an option takes, for its help."""
    if part_of(field):
        return "[true|false]"
    if is_list(field):
        return "LIST"
    kind = alternatives(field)[0]
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    return kind.__name__.upper()


def _default(field: FieldInfo) -> str:
    if field.default is None or field.is_required():
        return ""
    if isinstance(field.default, tuple):
        return f"  [{','.join(map(str, field.default))}]" if field.default else ""
    shown = str(field.default)
    return f"  [{shown.lower() if isinstance(field.default, bool) else shown}]"

"""Commands made from settings: one option per setting, grouped by part, named as everywhere else."""

import importlib
import importlib.util
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic.fields import FieldInfo

from raypkg.core.config import Settings, alternatives, current_name, is_list, leaves, parse_toml, part_of, read_toml
from raypkg.core.errors import UserError, shown
from raypkg.core.presets import presets_of
from raypkg.core.registry import Entry
from raypkg.core.settings import APART, RunSettings
from raypkg.experiments import settings_of

from .options import PLACE, TRUST, ExampleHelp

# A command's work: own options, file of settings, given settings, name, root
Run = Callable[[dict[str, Any], Path | None, dict[str, Any], str | None, str], None]


class SettingsCommand(ExampleHelp):
    """A command whose options are settings, grouped by part in its help; a former name is answered by the new one."""

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
            if record and isinstance(parameter, click.Option):  # arguments are in the usage line
                part, dot, _ = (parameter.name or "").partition("__")
                sections.setdefault(part if dot else "run", []).append(record)
        for part in sorted(sections, key=APART.__contains__):  # cluster and track come last
            with formatter.section(part):
                formatter.write_dl(sections[part])


class Family(ExampleHelp, click.Group):
    """The commands of an experiment."""


def experiment_command(entry: Entry) -> click.Command:
    """Make a command from an experiment: its settings are the options, its docstring is the help.

    If a module here has the experiment's name, the command becomes ``train`` in a group with that module's COMMANDS.
    """
    schema = settings_of(entry)

    def run(own: dict[str, Any], config: Path | None, values: dict[str, Any], name: str | None, root: str) -> None:
        from raypkg.experiments.resolve import with_run

        from .execute import dry_run, execute, resume_run

        resume = own["resume"]
        if resume is not None and not own["dry"]:
            resume_run(entry, resume, values, root, refused={"--config": config, "--name": name})
            return
        base, values = with_run(schema, read_toml(config) if config else {}, values, root)
        if own["dry"]:
            dry_run(entry, base, values, name, root, resume)
        else:
            execute(entry, base, values, name, root)

    dry = click.Option(["--dry-run", "dry"], is_flag=True, help="print the settings and the plan, and start nothing")
    command = settings_command(entry.name, schema, run, entry.text, [dry], "run", "data, model and time")
    module = f"{__package__}.{entry.name}"
    if not importlib.util.find_spec(module):
        return command
    command.name = "train"
    return Family(entry.name, [command, *importlib.import_module(module).COMMANDS], help=command.help)


def settings_command(
    name: str,
    schema: type[RunSettings],
    run: Run,
    text: str,
    options: Sequence[click.Option],
    of: str,
    default_name: str,
) -> click.Command:
    """Make a command on runs or studies, with its own options and those that all have; ``text`` is the help.

    ``run`` receives its own options and ``resume``, the file of settings, the given settings, the name and the root.
    """
    resuming = click.Option(["--resume"], metavar="NAME", help=f"resume an interrupted {of}")
    own = [*options, resuming]

    def callback(config: Path | None, pairs: tuple[str, ...], label: str | None, root: str, **given: Any) -> None:
        asked = {option.name or "": given.pop(option.name or "") for option in own}
        run(asked, config, overrides(schema, given, pairs), label, root)

    argument = [click.Argument([schema.argument], metavar="RUN", required=False)] if schema.argument else []
    common = [
        click.Option(["--config"], metavar="FILE", type=Path, help="settings in TOML; options override it"),
        click.Option(["--set", "pairs"], multiple=True, metavar="KEY=VALUE", help="any setting by name"),
        click.Option(["--name", "label"], help=f"name of the {of} (default: generated from {default_name})"),
    ]
    params = [*argument, *options, *common, resuming, PLACE, TRUST, *setting_options(schema)]
    return SettingsCommand(name, schema=schema, callback=callback, help=text, params=params)


def setting_options(schema: type[Settings]) -> Iterator[click.Option]:
    """Make one option for every setting but the open ``options`` tables; ``--model`` is short for ``--model.name``.

    An optional part is an option too: ``--agent`` enables it with its defaults.
    """
    for name, field in leaves(schema):
        if name.rpartition(".")[2] in ("options", "adapted") or name == getattr(schema, "argument", ""):
            continue
        short = [f"--{name.removesuffix('.name')}"] if name.endswith(".name") else []
        switch: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if part_of(field) else {}
        default = field.default
        shown_default = ""
        if isinstance(default, tuple):
            shown_default = ",".join(map(str, default))
        elif default is not None and not field.is_required():
            shown_default = str(default).lower() if isinstance(default, bool) else str(default)
        if name == "preset" and (presets := presets_of(schema)):
            shown_default = "published; " + "; ".join(f"{each}: {it.about}" for each, it in presets.items())
        yield click.Option(
            [*short, f"--{name}", name.replace(".", "__")],
            metavar=metavar(field),
            help=f"{field.description or ''}{f'  [{shown_default}]' if shown_default else ''}",
            multiple=is_list(field),
            **switch,
        )


def metavar(field: FieldInfo) -> str:
    """Return the kind of value that an option takes, for its help."""
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
        # The settings convert a field's text themselves; lists, tables and options of unknown type are TOML.
        is_toml = name not in fields or text.startswith(("[", "{"))
        values[name] = _value(text) if is_toml else text
    return values


def parsed_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Return KEY=VALUE texts as a dictionary of TOML values."""
    return {name: _value(text) for name, text in _split(pairs)}


def _split(pairs: Iterable[str]) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not (name and equals):
            raise UserError(f"--set {shown(pair)} is not of the form KEY=VALUE")
        yield name.strip(), text.strip()


def _value(text: str) -> Any:
    """Return a TOML value; any other text is a string."""
    try:
        values = parse_toml(f"value = {text}", text)
    except UserError:
        return text
    return values["value"] if len(values) == 1 else text  # a further line would set something else

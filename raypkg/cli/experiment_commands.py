"""The command of an experiment, made from its settings, and the group that it may be the first of."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import click

from raypkg.core.registry import Entry
from raypkg.experiments import settings_of
from raypkg.runs import ROOT

from .options import ROOT_HELP, SHOWN_ROOT, TRUST, ExampleHelp
from .setting_options import SettingsCommand, overrides, setting_options


class Family(ExampleHelp, click.Group):
    """An experiment's commands."""


def experiment_command(entry: Entry) -> click.Command:
    """Make a command from an experiment: its settings are its options, its docstring is its help."""
    schema = settings_of(entry)

    def callback(
        config: Path | None,
        pairs: tuple[str, ...],
        name: str | None,
        resume: str | None,
        root: str,
        dry: bool,
        **given: Any,
    ) -> None:
        from .execute import execute, resume_run

        values = overrides(schema, given, pairs)
        if dry:
            from .dry_run import dry_run

            dry_run(entry, schema, config, values, name, root, resume)
        elif resume is not None:
            resume_run(entry, schema, resume, values, root, refused={"--config": config, "--name": name})
        else:
            execute(entry, schema, config, values, name, root)

    return SettingsCommand(
        entry.name,
        schema=schema,
        callback=callback,
        help=entry.text,
        params=[
            click.Option(["--config"], metavar="FILE", type=Path, help="settings in TOML; options win over it"),
            click.Option(["--set", "pairs"], multiple=True, metavar="KEY=VALUE", help="any setting by name"),
            click.Option(["--name"], help="of the run; made up from data, model and time when left out"),
            click.Option(["--resume"], metavar="NAME", help="resume a stopped run"),
            click.Option(["--root"], default=ROOT, show_default=SHOWN_ROOT, help=ROOT_HELP),
            click.Option(["--dry-run", "dry"], is_flag=True, help="print the settings and the plan, and start nothing"),
            TRUST,
            *setting_options(schema),
        ],
    )


def with_companions(command: click.Command) -> click.Command:
    """Return an experiment's command, or a group of it, named train, and the ``COMMANDS`` of the module of its name."""
    name = f"{__package__}.{command.name}"
    if not importlib.util.find_spec(name):
        return command
    companions = importlib.import_module(name).COMMANDS
    command.name, group = "train", command.name
    return Family(group, [command, *companions], help=command.help)

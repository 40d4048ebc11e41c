"""The command ``effray tune``: a subcommand for every experiment that trains."""

import re
from pathlib import Path
from typing import Any

import click

from raypkg.core.errors import UserError, unknown
from raypkg.core.registry import Entry
from raypkg.core.settings import Experiment
from raypkg.experiments import experiment, settings_of
from raypkg.runs import ROOT

from .options import ROOT_HELP, ExampleHelp, SettingsCommand, overrides, setting_options

SCHEDULERS = ("asha", "hyperband", "median", "none")
SEARCHES = ("random", "grid", "optuna")
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
EXAMPLE = """

The trials of a sweep are runs like any other. Options given here hold for all of them, and so does what a file sets
(--config) where the space does not vary it.

Example:
    effray tune {name} --samples 8 --dataset digits
"""


class Duration(click.ParamType):
    """Seconds, or a number with s, m or h."""

    name = "duration"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        """Return seconds."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(value))
        if not match or float(match[1]) <= 0:
            raise UserError(f"--time-budget {value!r}: give seconds, or a number with s, m or h, such as 90s or 2h")
        return float(match[1]) * UNITS[match[2]]


class Choice(click.ParamType):
    """One of a few names."""

    name = "choice"

    def __init__(self, kind: str, allowed: tuple[str, ...]):
        self.kind, self.allowed = kind, allowed

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return the names."""
        return "|".join(self.allowed)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        """Refuse others, naming the nearest."""
        if value not in self.allowed:
            raise unknown(self.kind, value, self.allowed)
        return value


class Tune(ExampleHelp, click.Group):
    """A command for every experiment that trains."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of those experiments."""
        return [name for name, entry in experiment.entries.items() if issubclass(settings_of(entry), Experiment)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Make the command when it is asked for."""
        return _command(experiment.entries[name]) if name in self.list_commands(context) else None

    def resolve_command(self, context: click.Context, arguments: list[str]) -> tuple[Any, Any, list[str]]:
        """Name the nearest experiment to one that does not exist."""
        if arguments[0] not in self.list_commands(context):
            raise unknown("experiment to tune", arguments[0], self.list_commands(context))
        return super().resolve_command(context, arguments)


@click.group(cls=Tune)
def tune() -> None:
    """Sweep an experiment's settings with Ray Tune: many runs, the worst stopped early, one table.

    What is varied is in tune_spaces/NAME.py, here or in the package; --space names another file.

    Example:
        effray tune crest
    """


def _command(entry: Entry) -> click.Command:
    schema = settings_of(entry)

    def callback(
        config: Path | None, pairs: tuple[str, ...], name: str | None, resume: str | None, root: str, **given: Any
    ) -> None:
        from raypkg.sweeps.order import Order
        from raypkg.sweeps.sweep import resume_sweep, start_sweep

        asked = {option: given.pop(option) for option in Order.options()}
        values = overrides(schema, given, pairs)
        order = Order(entry.name, **asked)
        if resume is None:
            start_sweep(entry, order, config, values, name, root)
        elif config is not None or name is not None:
            raise UserError(f"--resume {resume} keeps what was asked for: neither --config nor --name can change")
        else:
            resume_sweep(entry, order, resume, values, root)

    return SettingsCommand(
        entry.name,
        schema=schema,
        callback=callback,
        help=f"Sweep settings of: {entry.help}{EXAMPLE.format(name=entry.name)}",
        params=[
            click.Option(["--space"], metavar="FILE|NAME", help=f"what to vary; left out = {entry.name}"),
            click.Option(["--samples"], type=int, help="trials; left out = 8, and of a grid all"),
            click.Option(["--metric"], help="what is compared; left out = the space's"),
            click.Option(["--mode"], type=Choice("mode", ("max", "min")), help="of the metric; left out = its own"),
            click.Option(
                ["--scheduler"], type=Choice("scheduler", SCHEDULERS), help="what stops trials early; left out = asha"
            ),
            click.Option(
                ["--search"], type=Choice("search", SEARCHES), help="how settings are drawn; left out = random"
            ),
            click.Option(["--concurrent"], type=int, help="trials at once; left out = as many as fit"),
            click.Option(["--time-budget"], type=Duration(), metavar="TIME", help="such as 90s, 10m or 2h"),
            click.Option(["--proxy"], type=float, metavar="SHARE", help="tune on a coreset, the best on all samples"),
            click.Option(["--proxy-method"], metavar="NAME", help="that selects it; left out = gradmatch"),
            click.Option(["--config"], metavar="FILE", type=Path, help="settings in TOML; options win over it"),
            click.Option(["--set", "pairs"], multiple=True, metavar="KEY=VALUE", help="any setting by name"),
            click.Option(["--name"], help="of the sweep; made up from experiment and time when left out"),
            click.Option(["--resume"], metavar="NAME", help="go on with a stopped sweep"),
            click.Option(["--root"], default=ROOT, show_default=True, help=ROOT_HELP),
            *setting_options(schema),
        ],
    )

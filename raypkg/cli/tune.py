"""The command ``effray tune``: a subcommand for every experiment that trains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raypkg.core.errors import UserError, unknown
from raypkg.experiments import experiment, settings_of
from raypkg.runs import ROOT

from .options import ROOT_HELP, SHOWN_ROOT, TRUST, ExampleHelp

if TYPE_CHECKING:
    from raypkg.core.registry import Entry

SCHEDULERS = ("asha", "hyperband", "median", "fifo")
RENAMED = {"none": "fifo"}  # schedulers
SEARCHES = ("random", "grid", "optuna")
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
EXAMPLE = """

The trials of a sweep are runs like any other. Options given here hold for all of them, and so does what a file sets
(--config) where the space does not vary it. Schedulers stop the worst trials early; fifo runs all of them to their end.

Example:
    effray tune {name} --samples 8 --dataset digits
"""


class Duration(click.ParamType):
    """Seconds, or a number with s, m or h."""

    name = "duration"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        """Return seconds."""
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", str(value))
        if not match or float(match[1]) <= 0:
            raise UserError(f"--time-budget {value!r}: give seconds, or a number with s, m or h, such as 90s or 2h")
        return float(match[1]) * UNITS[match[2]]


class Choice(click.ParamType):
    """One of a few names.

    Args:
        kind: what is chosen, for errors.
        allowed: the names.
        renamed: old names, each with its new one.
    """

    name = "choice"

    def __init__(self, kind: str, allowed: tuple[str, ...], renamed: Mapping[str, str] | None = None):
        self.kind = kind
        self.allowed = allowed
        self.renamed = renamed or {}

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return the names."""
        return "|".join(self.allowed)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        """Refuse others, naming the new one or the nearest."""
        if now := self.renamed.get(value):
            raise UserError(f"{self.kind} {value} is now called {now}")
        if value not in self.allowed:
            raise unknown(self.kind, value, self.allowed)
        return value


class Tune(ExampleHelp, click.Group):
    """A command for every experiment that trains."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of those experiments."""
        from raypkg.core.settings import Experiment

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

    What is varied is in tune_spaces/NAME.py, in the working folder or else in the package; --space names another file.
    A space is Python code, and so is the space.py of a stored sweep, which --resume runs.

    Example:
        effray tune crest
    """


def _command(entry: Entry) -> click.Command:
    from .setting_options import SettingsCommand, overrides, setting_options

    schema = settings_of(entry)

    def callback(
        config: Path | None, pairs: tuple[str, ...], name: str | None, resume: str | None, root: str, **given: Any
    ) -> None:
        from raypkg.studies.order import Order
        from raypkg.studies.sweep import resume_sweep, start_sweep

        asked = {option: given.pop(option) for option in Order.options()}
        order = Order(entry.name, **asked)
        values = overrides(schema, given, pairs)
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
        params=[*_sweep_options(entry.name), *_run_options(), *setting_options(schema)],
    )


def _sweep_options(experiment: str) -> list[click.Option]:
    mode = Choice("mode", ("max", "min"))
    scheduler = Choice("scheduler", SCHEDULERS, RENAMED)
    search = Choice("search", SEARCHES)
    return [
        click.Option(["--space"], metavar="FILE|NAME", help=f"what to vary (default: {experiment})"),
        click.Option(["--samples"], type=int, help="trials (default: 8; of a grid, all)"),
        click.Option(["--metric"], help="by which trials are compared (default: the space's)"),
        click.Option(["--mode"], type=mode, help="whether the metric is to be large or small (default: its own)"),
        click.Option(["--scheduler"], type=scheduler, help="what stops trials early; fifo = nothing (default: asha)"),
        click.Option(["--search"], type=search, help="how settings are drawn (default: random)"),
        click.Option(["--concurrent"], type=int, help="trials at once (default: as many as fit)"),
        click.Option(["--time-budget"], type=Duration(), metavar="TIME", help="such as 90s, 10m or 2h"),
    ]


def _run_options() -> list[click.Option]:
    return [
        click.Option(["--config"], metavar="FILE", type=Path, help="settings in TOML; options win over it"),
        click.Option(["--set", "pairs"], multiple=True, metavar="KEY=VALUE", help="any setting by name"),
        click.Option(["--name"], help="of the sweep; made up from experiment and time when left out"),
        click.Option(["--resume"], metavar="NAME", help="continue a stopped sweep"),
        click.Option(["--root"], default=ROOT, show_default=SHOWN_ROOT, help=ROOT_HELP),
        TRUST,
    ]

"""Parts of several commands: common options, and help that ends with an example."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import click

from raypkg.core.errors import UserError, printable, redacted
from raypkg.runs import ROOT

PLACE = click.Option(
    ["--root"],
    default=ROOT,
    show_default=True if redacted(ROOT) == ROOT else redacted(ROOT),  # without a secret in it
    help="folder or URI of all runs; EFFRAY_RUNS sets it too",
)


def say(text: str) -> None:
    """Print a text without credentials, and without characters that control the terminal."""
    click.echo(printable(redacted(text)))


def confirmed(deed: str) -> bool:
    """Ask on the terminal whether to do something.

    Raises:
        UserError: there is no terminal.
    """
    if not (sys.stdin and sys.stdin.isatty()):  # None if closed
        raise UserError(f"there is no terminal to ask on whether to {deed}: --yes does it without asking")
    return click.confirm(f"{deed}?")


def trusting(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Trust the code that stored runs name, if the user says so."""
    if value:
        from raypkg.experiments.resolve import trust_all

        trust_all()


TRUST = click.Option(
    ["--trust"],
    is_flag=True,
    expose_value=False,
    callback=trusting,
    help="run the code that a stored run names, also where its files are not your own",
)


class ExampleHelp(click.Command):
    """Help that ends with the docstring's example, as written."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Parse the command line; arguments that are not UTF-8 could neither be stored nor printed."""
        for argument in arguments:
            if not argument.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in argument):
                raise UserError(f"argument {argument!r} is not UTF-8 text")
        return super().parse_args(context, arguments)

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the whole first line; the list of commands wraps it."""
        return self._parts()[0].partition("\n")[0]

    def format_help_text(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the text before the example; the options follow."""
        for paragraph in self._parts()[0].split("\n\n"):
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(paragraph)

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example."""
        with formatter.section("Example"):
            formatter.write(f"{'':2}{self._parts()[1]}\n")

    def _parts(self) -> tuple[str, str]:
        text, _, example = inspect.cleandoc(self.help or "").partition("Example:")
        return text.strip(), example.strip()


class Catalogue(ExampleHelp, click.Group):
    """Commands that are made on request, one for each name of a catalogue; ``make`` refuses other names."""

    def __init__(
        self, *arguments: Any, names: Callable[[], list[str]], make: Callable[[str], click.Command], **options: Any
    ):
        super().__init__(*arguments, **options)
        self.names = names
        self.make = make

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names."""
        return self.names()

    def get_command(self, context: click.Context, name: str) -> click.Command:
        """Make a command."""
        return self.make(name)

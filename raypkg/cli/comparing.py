"""The commands ``effray compare``, a subcommand for every table, and ``effray report``."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from raypkg.core.errors import UserError, unknown
from raypkg.experiments import experiment, settings_of
from raypkg.runs import ROOT
from raypkg.studies.shipped import SUFFIX, TABLES, shipped_files
from raypkg.studies.tables import SCALES, Table, check_seeds, narrowed, open_table

from .options import ROOT_HELP, SHOWN_ROOT, TRUST, ExampleHelp
from .tune import Choice

RANGE = re.compile(r"(\d{1,6})-(\d{1,6})")
HELP = """{title}

Rows: {rows}.{cases}

Each row is run from each seed; what an earlier call has finished is not run again, and a stopped comparison goes on
with the same command. With --cluster.workers 0 the trials run one after another in this process, without Ray.

Example:
    effray compare {name} --dataset digits
"""


class Tables(ExampleHelp, click.Group):
    """A command for every table."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of the tables in the working folder and in this package."""
        return sorted(shipped_files(TABLES))

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Make the command when it is asked for."""
        if not (name in shipped_files(TABLES) or name.endswith(SUFFIX)):
            return None
        return _command(name, open_table(name))

    def resolve_command(self, context: click.Context, arguments: list[str]) -> tuple[Any, Any, list[str]]:
        """Name the nearest table to one that does not exist."""
        name = arguments[0]
        if not (name in shipped_files(TABLES) or name.endswith(SUFFIX)):
            raise unknown("table", name, shipped_files(TABLES))
        return super().resolve_command(context, arguments)


@click.group("compare", cls=Tables)
def compare_tables() -> None:
    """Compare methods by a table: rows of settings, each from several seeds, with a baseline beside them.

    A table is tune_spaces/tables/NAME.py, in the working folder or else in the package, or a path to a file.

    Example:
        effray compare crest --dataset digits
    """


def _command(name: str, table: Table) -> click.Command:
    from .setting_options import SettingsCommand, overrides, setting_options

    if table.experiment not in experiment:
        raise UserError(f"table {name!r}: {unknown('experiment', table.experiment, experiment.names)}")
    schema = settings_of(experiment[table.experiment])

    def callback(
        config: Path | None,
        pairs: tuple[str, ...],
        name_: str | None,
        resume: str | None,
        root: str,
        rows: tuple[str, ...],
        cases: tuple[str, ...],
        seeds: str | None,
        scale: str | None,
        goals: tuple[str, ...],
        concurrent: int | None,
        **given: Any,
    ) -> None:
        from raypkg.studies.comparison import Asked, compare_rows, resume_comparison

        values = overrides(schema, given, pairs)
        if resume is not None:
            settled = {"--config": config, "--name": name_, "--seeds": seeds, "--scale": scale}
            chosen = {"--rows": rows, "--cases": cases, "--goal": goals}
            options = [option for option, value in settled.items() if value is not None]
            if options := options + [option for option, value in chosen.items() if value]:
                raise UserError(f"--resume {resume} keeps what was asked for: {options[0]} cannot change")
            resume_comparison(resume, values, concurrent, name, root)
            return
        scale = scale or SCALES[0]
        content = narrowed(open_table(name, scale), _split(rows), _split(cases), _seeds(seeds))
        if goals:
            content = replace(content, goals=_goals(goals))
        compare_rows(Asked(name, scale, content, concurrent), config, values, name_, root)

    several = len(table.cases) > 1
    return SettingsCommand(
        name,
        schema=schema,
        callback=callback,
        help=HELP.format(
            title=table.title,
            rows=_quoted(table.rows),
            cases=f" Cases: {_quoted(table.cases)}." if several else "",
            name=name,
        ),
        params=[*_options(table), *setting_options(schema)],
    )


def _quoted(labels: Iterable[str]) -> str:
    """Return labels as a shell takes them: most have blanks and semicolons."""
    return ", ".join(f"'{label}'" for label in labels)


def _options(table: Table) -> list[click.Option]:
    seeds = ",".join(map(str, table.seeds))
    return [
        click.Option(["--rows"], multiple=True, metavar="LIST", help="labels or patterns; the baseline is added"),
        click.Option(["--cases"], multiple=True, metavar="LIST", help="labels or patterns (default: all)"),
        click.Option(["--seeds"], metavar="LIST", help=f"such as 0,1,2 or 0-9 (default: {seeds})"),
        click.Option(
            ["--scale"], type=Choice("scale", SCALES), help=f"small runs or the paper's (default: {SCALES[0]})"
        ),
        click.Option(["--goal", "goals"], multiple=True, metavar="METRIC=VALUE", help="tell what reaching it costs"),
        click.Option(["--concurrent"], type=int, help="trials at once (default: as many as fit)"),
        click.Option(["--config"], metavar="FILE", type=Path, help="settings in TOML; options win over it"),
        click.Option(["--set", "pairs"], multiple=True, metavar="KEY=VALUE", help="any setting by name"),
        click.Option(["--name", "name_"], help="of the comparison (default: from table, data set and scale)"),
        click.Option(["--resume"], metavar="NAME", help="go on with one as it was asked for"),
        click.Option(["--root"], default=ROOT, show_default=SHOWN_ROOT, help=ROOT_HELP),
        TRUST,
    ]


def _split(texts: tuple[str, ...]) -> list[str] | None:
    """Return the labels of repeated options, each a list split at commas; None where none was given."""
    labels = [label.strip() for text in texts for label in text.split(",")]
    return [label for label in labels if label] or None


def _seeds(text: str | None) -> list[int] | None:
    """Return seeds such as 0,1,2 or 0-9.

    Raises:
        UserError: no such list.
    """
    if text is None:
        return None
    seeds: list[int] = []
    for part in text.split(","):
        if match := RANGE.fullmatch(part.strip()):
            seeds += range(int(match[1]), int(match[2]) + 1)
        elif re.fullmatch(r"\d{1,18}", part.strip()):
            seeds.append(int(part))
        else:
            raise UserError(f"--seeds {text!r}: integers, such as 0,1,2 or 0-9")
    check_seeds(seeds, "--seeds")
    return seeds


def _goals(texts: tuple[str, ...]) -> dict[str, list[float]]:
    """Return goals such as accuracy=0.9.

    Raises:
        UserError: a text is not of that form.
    """
    goals: dict[str, list[float]] = {}
    for text in texts:
        metric, _, value = text.partition("=")
        if not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", value):
            raise UserError(f"--goal {text!r} is not of the form METRIC=VALUE, such as accuracy=0.9")
        goals.setdefault(metric, []).append(float(value))
    return goals


@click.command("report", cls=ExampleHelp, params=[TRUST])
@click.argument("name")
@click.option("--root", default=ROOT, show_default=SHOWN_ROOT, help=ROOT_HELP)
def report_page(name: str, root: str) -> None:
    """Write a finished run, a sweep or a comparison as one HTML page, its pictures inside.

    NAME is a name below --root, or a path to a folder. The page is report.html in that folder; it needs no network.

    Example:
        effray train --name first && effray report first
    """
    from raypkg.core.errors import redacted
    from raypkg.runs.folder import locate
    from raypkg.studies.pages import write_page

    click.echo(redacted(write_page(locate(root, name))))

"""The commands on studies: ``effray tune``, ``effray compare`` and ``effray report``."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path
from typing import Any

import click

from raypkg.core.errors import UserError, unknown
from raypkg.experiments import experiment, settings_of

from .options import PLACE, TRUST, Catalogue, ExampleHelp, confirmed, say

MOST_UNASKED = 100  # trials of a comparison that start without asking
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
TUNE_HELP = """Sweep settings of: {title}

The trials of a sweep are runs like any other. Options given here hold for all of them, and so does what a file sets
(--config) where the space does not vary it. Schedulers stop the worst trials early; fifo runs all of them to their end.

Example:
    effray tune {name} --samples 8 --dataset digits
"""
COMPARE_HELP = """{title}

Rows: {rows}.{cases}

Each row is run from each seed. What an earlier call has finished is not run again, and the same command resumes an
interrupted comparison. With --cluster.workers 0 the trials run one after another in this process, without Ray.

Example:
    effray compare {name} {part} --seeds 0
"""


CONCURRENT = click.Option(["--concurrent"], type=click.IntRange(1), help="trials at once (default: as many as fit)")


# effray tune


def _experiments() -> list[str]:
    from raypkg.core.settings import Experiment

    return [name for name, entry in experiment.entries.items() if issubclass(settings_of(entry), Experiment)]


def _seconds_of(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", text)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--time-budget {text!r}: give seconds, or a number with s, m or h, such as 90s or 2h")
    return float(match[1]) * UNITS[match[2]]


def _tune_command(name: str) -> click.Command:
    from raypkg.studies.tables import MOST_TRIALS

    from .setting_options import settings_command

    if name not in _experiments():
        raise unknown("experiment to tune", name, _experiments())
    entry = experiment[name]
    options = [
        click.Option(["--space"], metavar="FILE|NAME", help=f"what to vary (default: {name})"),
        click.Option(["--samples"], type=click.IntRange(1, MOST_TRIALS), help="trials (default: 8; of a grid, all)"),
        click.Option(["--metric"], help="by which trials are compared (default: the space's)"),
        click.Option(["--mode"], metavar="max|min", help="direction of the metric (default: its own)"),
        click.Option(
            ["--scheduler"],
            metavar="asha|hyperband|median|fifo",
            help="what stops trials early; fifo = nothing (default: asha)",
        ),
        click.Option(["--search"], metavar="random|grid|optuna", help="how settings are drawn (default: random)"),
        click.Option(["--time-budget"], type=_seconds_of, metavar="TIME", help="such as 90s, 10m or 2h"),
        CONCURRENT,
    ]

    def run(own: dict[str, Any], config: Path | None, values: dict[str, Any], label: str | None, root: str) -> None:
        from raypkg.studies.start import resume_study, start_sweep

        resume = own.pop("resume")
        asked = {option: value for option, value in own.items() if value is not None}
        if resume is None:
            start_sweep(entry, asked, config, values, label, root)
        else:
            fixed = {option: value for option, value in (("config", config), ("name", label)) if value is not None}
            resume_study(resume, f"effray tune {name}", {**fixed, **asked}, values, root)

    text = TUNE_HELP.format(title=entry.help, name=name)
    return settings_command(name, settings_of(entry), run, text, options, "sweep", "experiment and time")


@click.group(cls=Catalogue, names=_experiments, make=_tune_command)
def tune() -> None:
    """Sweep an experiment's settings with Ray Tune: many runs, the worst stopped early, one table.

    What is varied is in tune_spaces/NAME.py, in the working folder or else in the package; --space names another file.
    A space is Python code, and so is the space.py of a stored sweep, which --resume runs.

    Example:
        effray tune crest
    """


# effray compare


def _tables() -> list[str]:
    from raypkg.studies.tables import TABLES, shipped_files

    return sorted(shipped_files(TABLES))


def _labels_of(text: str) -> list[str]:
    return [label for part in text.split(",") if (label := part.strip())]


def _seeds_of(text: str) -> list[int]:
    from raypkg.studies.tables import MOST_TRIALS

    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(-\d{1,18})?", part.strip())
        if not match:
            raise UserError(f"--seeds {text!r}: integers, such as 0,1,2 or 0-9")
        more = range(int(match[1]), int((match[2] or "")[1:] or match[1]) + 1)
        if len(seeds) + len(more) > MOST_TRIALS:
            raise UserError(f"--seeds {text!r}: {len(seeds) + len(more):,} seeds, at most {MOST_TRIALS:,} trials")
        seeds += more
    return seeds


def _compare_command(name: str) -> click.Command:
    from raypkg.studies.tables import SCALES, VERDICTS, narrowed, open_table

    from .setting_options import settings_command

    table = open_table(name)

    def run(own: dict[str, Any], config: Path | None, values: dict[str, Any], label: str | None, root: str) -> None:
        from raypkg.studies.start import plan, resume_study, start_comparison

        resume, concurrent, expected, dry = (own.pop(name) for name in ("resume", "concurrent", "expect", "dry"))
        rate, yes = own.pop("rate"), own.pop("yes")

        def check(verdicts: list[str]) -> None:
            others = [word for word in verdicts if word != expected]
            if expected and others:
                say(f"expected {expected}: {len(others)} of {len(verdicts)} verdicts are others")
                raise SystemExit(1)

        if rate and not dry:
            raise UserError(f"--rate {rate:g} does nothing without --dry-run")
        if resume is not None:
            every = {"config": config, "name": label, "dry_run": dry or None, "concurrent": concurrent, **own}
            changed = {option: value for option, value in every.items() if value not in (None, ())}
            check(resume_study(resume, f"effray compare {name}", changed, values, root))
            return
        scale = SCALES[0] if own["scale"] is None else own["scale"]
        rows, cases = ([*chain(*own[part])] or None for part in ("rows", "cases"))
        chosen = narrowed(open_table(name, scale), rows, cases, own["seeds"])
        goals: dict[str, list[str]] = {}
        for text in own["goal"]:
            metric, _, value = text.partition("=")
            goals.setdefault(metric, []).append(value)
        chosen = chosen.changed(goals=goals or chosen.goals, rates=own["rates"] or chosen.rates)
        if dry:
            for line in plan(chosen, config, values, rate):
                say(line)
            return
        trials = sum(1 for _ in chosen.places())
        if trials > MOST_UNASKED and not yes:
            *_, total = plan(chosen, config, values, rate)
            say(f"{total} (each row: --dry-run)")
            if not confirmed(f"start {trials} trials"):
                return
        check(start_comparison(name, scale, chosen, concurrent, config, values, label, root))

    seeds = ",".join(map(str, table.seeds))
    options = [
        click.Option(
            ["--rows"], type=_labels_of, multiple=True, metavar="LIST", help="labels or patterns; the baseline is added"
        ),
        click.Option(
            ["--cases"], type=_labels_of, multiple=True, metavar="LIST", help="labels or patterns (default: all)"
        ),
        click.Option(["--seeds"], type=_seeds_of, metavar="LIST", help=f"such as 0,1,2 or 0-9 (default: {seeds})"),
        click.Option(["--scale"], metavar="|".join(SCALES), help=f"small runs or the paper's (default: {SCALES[0]})"),
        click.Option(["--expect"], type=click.Choice(VERDICTS), help="exit with code 1 if a verdict is another one"),
        click.Option(["--dry-run", "dry"], is_flag=True, help="print trials and samples, and start nothing"),
        click.Option(["--rate"], type=click.FloatRange(min=0, min_open=True), help="samples a second, for --dry-run"),
        click.Option(["--yes"], is_flag=True, help=f"start more than {MOST_UNASKED} trials without asking"),
        click.Option(["--rates"], metavar="LIST", help="train.lr, of which a row takes the best by held-out accuracy"),
        click.Option(["--goal"], multiple=True, metavar="METRIC=VALUE", help="report the cost of reaching it"),
        CONCURRENT,
    ]
    # Labels are quoted as a shell takes them: most have blanks and semicolons.
    rows, cases = (", ".join(f"'{label}'" for label in labels) for labels in (table.rows, table.cases))
    others = [row for row in table.rows if row not in (table.baseline, *table.as_baseline)]
    part = f"--rows '{(others or [table.baseline])[0]}'"
    part += f" --cases '{next(iter(table.cases))}'" if len(table.cases) > 1 else ""
    part += " --dataset text:path/to/texts" if table.shared.get("model.name") == "transformer" else " --dataset digits"
    cases = f" Cases: {cases}." if len(table.cases) > 1 else ""
    text = COMPARE_HELP.format(title=table.title, rows=rows, cases=cases, name=name, part=part)
    schema = settings_of(experiment[table.experiment])
    return settings_command(name, schema, run, text, options, "comparison", "table, data set and scale")


@click.group("compare", cls=Catalogue, names=_tables, make=_compare_command)
def compare_tables() -> None:
    """Compare methods by a table: rows of settings, each run with several seeds, against a baseline.

    A table is tune_spaces/tables/NAME.py, in the working folder or else in the package, or a path to a file.

    Example:
        effray compare crest --rows crest --cases 'mlp*' --seeds 0 --dataset digits
    """


@click.command("report", cls=ExampleHelp, params=[TRUST, PLACE])
@click.argument("name")
def report_page(name: str, root: str) -> None:
    """Write a finished run, a sweep or a comparison as one HTML page, its pictures inside.

    NAME is a name below --root, or a path to a folder. The page is report.html in that folder; it needs no network.

    Example:
        effray train --name first && effray report first
    """
    from raypkg.runs.catalog import locate
    from raypkg.studies.show import write_page

    say(write_page(locate(root, name)))

"""A sweep as a table on the terminal, with the best trial and the Pareto front, and its pictures."""

import shlex
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from raypkg.core.errors import redacted
from raypkg.runs.activity import GOING, resuming, state_of
from raypkg.runs.plots import save_plot
from raypkg.runs.sealed import CONFIG
from raypkg.runs.show import STATES, findings, terminal
from raypkg.runs.style import in_full

from . import plots
from .standing import Row, Standing, standing_of
from .sweep_folder import BEST, SweepFolder

WIDEST = 1000  # columns


def show_sweep(sweep: SweepFolder, console: Console) -> None:
    """Print the trials, the best of them and how to run it again."""
    standing = standing_of(sweep)
    print_whole(_table(sweep, standing))
    for row in standing.results:
        if row["error"]:
            console.print(f"{row['run']} failed: {row['error']}", soft_wrap=True)
    for line in _best_lines(sweep, standing):
        console.print(line, soft_wrap=True)
    console.print(redacted(sweep.storage.root), style="dim", soft_wrap=True)


def show_resumption(sweep: SweepFolder, root: str, console: Console) -> None:
    """Print whether a sweep is going or was stopped, if it is not done, and the command that resumes it.

    Args:
        sweep: the folder.
        root: of all runs, as the user gave it.
        console: where to print.
    """
    left = trials_left(sweep)
    if not left:
        return
    state = state_of(sweep.storage)
    console.print(f"{sweep.name}: {left} trials are left, {STATES[state]}", soft_wrap=True)
    if state != GOING:
        command = resuming(sweep.command, sweep.storage, root)
        console.print(f"resume with: {command}", soft_wrap=True)


def trials_left(sweep: SweepFolder) -> int:
    """Return how many trials of a sweep are still to be run."""
    return len(sweep.waiting()) + len(sweep.further())


def conclude(sweep: SweepFolder) -> None:
    """Write what there is so far: the table of all trials, the settings of the best, and the pictures."""
    standing = standing_of(sweep)
    results = standing.results
    metric = sweep.metric
    sweep.conclude(results, standing.best)

    names = _varied(sweep)
    curves = {sweep.run_name(number): run.curve(metric) for number, run in standing.runs.items()}
    best = standing.best["run"] if standing.best else None
    storage = sweep.storage
    save_plot(storage, "settings", lambda path: plots.against_settings(results, names, metric, path))
    save_plot(storage, "parallel", lambda path: plots.parallel(results, names, metric, sweep.mode, path))
    save_plot(storage, "curves", lambda path: plots.learning_curves(curves, metric, best, path))
    save_plot(storage, "pareto", lambda path: plots.pareto(results, standing.front, metric, path))


def _best_lines(sweep: SweepFolder, standing: Standing) -> Iterator[str]:
    """Yield what the best trial is, what it reached, and where its settings are."""
    best = standing.best
    if best is None:
        return
    number = best["trial"]
    metric = sweep.metric
    yield f"best: {best['run']}, {metric} {in_full(best[metric])}"
    summary = standing.runs[number].summary or {}
    yield findings(summary)[0]
    if sweep.best == sweep.lasting(number):
        file = f"{sweep.storage.root}/{BEST}"
    else:  # that file is of the last time that the sweep ended
        file = f"{sweep.run_storage(number).root}/{CONFIG}"
    yield f"its settings: effray {sweep.experiment} --config {shlex.quote(redacted(file))}"


def print_whole(table: Table) -> None:
    """Print a table of any width: with many settings the terminal wraps its lines, and no figure is cut off."""
    console = terminal()
    options = console.options.update(max_width=WIDEST)
    needed = Measurement.get(console, options, table).maximum
    console.width = max(console.width, needed)
    console.print(table)


def _table(sweep: SweepFolder, standing: Standing) -> Table:
    metric = sweep.metric
    names = _varied(sweep)
    title = f"{sweep.name}: * = on the Pareto front of {metric} against samples backward"
    table = Table(title=title, title_justify="left", box=SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("\ntrial", justify="right")  # headings have two lines
    table.add_column("\nstate")
    for heading in ("\nepochs", f"\n{metric}", "samples\nbackward", "\nseconds"):
        table.add_column(heading, justify="right")
    for name in names:
        part, _, rest = name.rpartition(".")
        table.add_column(f"{part}\n{rest}", justify="right")
    for row in standing.ranked:
        on_front = row["trial"] in standing.front
        table.add_row(*_cells(row, metric, names, on_front))
    return table


def _cells(row: Row, metric: str, names: list[str], on_front: bool) -> Iterator[str]:
    number = str(row["trial"])
    state = row["state"]
    yield f"*{number}" if on_front else number
    yield state
    for column in ("epochs", metric, "backward", "seconds"):
        yield in_full(row.get(column))
    for name in names:
        yield _number(row.get(name))


def _varied(sweep: SweepFolder) -> list[str]:
    """Return the names of the settings in which trials differ."""
    names: dict[str, None] = {}  # in the order of the space
    for trial in sweep.trials:
        names |= dict.fromkeys(trial["settings"] or ())
    return [*names]


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)

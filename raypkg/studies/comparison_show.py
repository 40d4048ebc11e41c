"""A comparison as tables: on the terminal, in Markdown, as parquet and as a page, with its pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import partial

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as RichTable

from raypkg.core.errors import redacted
from raypkg.runs.document import Grid, document, paragraph, picture
from raypkg.runs.environment import environment
from raypkg.runs.plots import save_plot
from raypkg.runs.style import duration, short

from . import comparison_plots
from .outcomes import Line, Outcomes, goals_of, numbers_of
from .paired import Difference, Estimate
from .show import print_whole
from .sweep_folder import SweepFolder
from .tables import REST, Table

MARKDOWN = "table.md"
PAGE = "report.html"
RESULTS = "results.parquet"
ROWS, CURVES = "rows", "curves"  # pictures of a case
LEGEND = (
    "mean ± standard deviation over seeds; difference from the baseline, seed by seed, with its 95 % interval"
    " (Student's t), ! where that leaves out zero; work = (forward + 2 · backward) / 3 samples, evaluation left out;"
    " Pareto front: of the metric against work"
)


def show_comparison(sweep: SweepFolder, console: Console, table: Table | None = None) -> None:
    """Print the table of a comparison.

    Args:
        sweep: its folder.
        console: where to print.
        table: some of its rows, cases and seeds; None = all that have trials.
    """
    outcomes = Outcomes(sweep, table or with_trials(sweep))
    for grid in grids(outcomes):
        print_whole(_rich(grid))
    for line in (LEGEND, *_shared(outcomes)):
        console.print(line, style="dim", soft_wrap=True)
    for record in outcomes.records():
        if record["error"]:
            console.print(f"{record['run']} failed: {record['error']}", soft_wrap=True)
    for file in (MARKDOWN, RESULTS, PAGE):
        console.print(f"{redacted(sweep.storage.root)}/{file}", style="dim", soft_wrap=True)


def conclude_comparison(sweep: SweepFolder) -> None:
    """Write what there is so far: parquet, Markdown, the pictures and the page, of all rows that have trials."""
    outcomes = Outcomes(sweep, with_trials(sweep))
    records = list(outcomes.records())
    sweep.conclude(records, None)
    parts = [f"# {outcomes.table.title}", f"Seeds {', '.join(map(str, outcomes.table.seeds))}; {LEGEND}."]
    parts += [grid.markdown() for grid in grids(outcomes)]
    parts += [*_shared(outcomes), _made_by(sweep)]
    sweep.storage.write(MARKDOWN, ("\n\n".join(parts) + "\n").encode())
    draw_cases(outcomes)
    sweep.storage.write(PAGE, comparison_page(outcomes).encode())


def draw_cases(outcomes: Outcomes) -> None:
    """Draw the rows of every case, and their learning curves where there are any."""
    storage = outcomes.sweep.storage
    table = outcomes.table
    for number, case in enumerate(outcomes.cases):
        rows = partial(comparison_plots.rows_of_case, case, table.metric)
        save_plot(storage, f"{ROWS}-{number:02d}", rows)
        if any(len(line.curve) > 1 for line in case.lines):
            curves = partial(comparison_plots.curves_of_case, case, table.baseline)
            save_plot(storage, f"{CURVES}-{number:02d}", curves)


def comparison_page(outcomes: Outcomes) -> str:
    """Return the page of a comparison, with the pictures that were drawn of it."""
    sweep = outcomes.sweep
    table = outcomes.table
    parts = [paragraph(table.title), paragraph(f"Seeds {', '.join(map(str, table.seeds))}; {LEGEND}.")]
    paper = paper_grid(table)
    for number, grid in enumerate(case_grids(outcomes)):
        parts.append(grid.html())
        for name, what in ((ROWS, f"{table.metric} of each row"), (CURVES, "learning curves")):
            if png := sweep.storage.read(f"plots/{name}-{number:02d}.png"):
                parts.append(picture(png, f"{what}, {grid.title}"))
    if paper:
        parts.append(paper.html())
    parts += [paragraph(line) for line in (*_shared(outcomes), _made_by(sweep))]
    return document(f"{sweep.name}: {sweep.order['asked']}, {sweep.order['scale']} scale", parts)


def with_trials(sweep: SweepFolder) -> Table:
    """Return the rows, cases and seeds of a comparison that anybody has asked for."""
    assert sweep.table is not None
    return Table.of(sweep.table)


def grids(outcomes: Outcomes) -> Iterator[Grid]:
    """Yield a grid for each case, then the paper's."""
    yield from case_grids(outcomes)
    if paper := paper_grid(outcomes.table):
        yield paper


def case_grids(outcomes: Outcomes) -> Iterator[Grid]:
    """Yield a grid for each case: its rows with value, difference, costs, goals and columns."""
    table = outcomes.table
    headings = ["row", table.metric.replace("_", " "), f"against\n{table.baseline}"]
    headings += ["samples\nforward", "samples\nbackward", "work", "seconds", "MiB"]
    headings += [f"backward to\n{metric} {_value(metric, goal)}" for metric, goal in goals_of(table)]
    headings += [*table.columns, "Pareto\nfront"]
    for case in outcomes.cases:
        emphasised = frozenset(place for place, line in enumerate(case.lines) if line.row == table.baseline)
        rows = [list(_cells(table, line)) for line in case.lines]
        yield Grid("" if case.label == REST else case.label, headings, rows, emphasised)


def paper_grid(table: Table) -> Grid | None:
    """Return the published figures, where there are any."""
    if not table.paper:
        return None
    rows = dict.fromkeys(row for figures in table.paper.values() for row in figures)
    cells = [[row, *(str(figures.get(row, "–")) for figures in table.paper.values())] for row in rows]
    return Grid("The paper's figures", ["row", *table.paper], cells)


def _cells(table: Table, line: Line) -> Iterator[str]:
    yield line.row
    yield _estimate(line.value, table.metric) + ("" if len(line.seeds) == line.of else f" ({len(line.seeds)})")
    yield _difference(line.difference, table.metric)
    for name in ("forward", "backward", "work"):
        yield _count(line.costs.get(name))
    yield _seconds(line.costs.get("seconds"))
    memory = line.costs.get("memory")
    yield f"{memory.mean / 2**20:,.0f}" if memory else "–"
    for reached in line.goals.values():
        part = "" if reached.seeds == reached.of else f" ({reached.seeds} of {reached.of})"
        yield _count(reached.backward) + part
    for value in line.columns.values():
        yield _plain(value)
    yield "yes" if line.on_front else ""


def _estimate(value: Estimate | None, metric: str) -> str:
    """Return mean ± standard deviation of a metric; shares in per cent."""
    if value is None:
        return "–"
    if not is_share(metric):
        return _plain(value)
    spread = "" if math.isnan(value.std) else f" ± {100 * value.std:.2f}"
    return f"{100 * value.mean:.2f}{spread} %"


def _difference(value: Difference | None, metric: str) -> str:
    if value is None:
        return "–"
    scale = 100 if is_share(metric) else 1
    form = "{:+.2f}" if scale == 100 else "{:+.3g}"
    mean = form.format(scale * value.mean)
    if math.isnan(value.half):
        return mean
    half = form.format(scale * value.half).lstrip("+")
    return f"{mean} ± {half}{' !' if value.is_clear else ''}"


def is_share(metric: str) -> bool:
    """Say whether a metric is printed in per cent."""
    return metric.endswith("accuracy")


def _value(metric: str, goal: float) -> str:
    return f"{100 * goal:g} %" if is_share(metric) else f"{goal:g}"


def _count(value: Estimate | None) -> str:
    return "–" if value is None else short(value.mean)


def _seconds(value: Estimate | None) -> str:
    return "–" if value is None else duration(value.mean)


def _plain(value: Estimate | None) -> str:
    if value is None:
        return "–"
    if abs(value.mean) >= 1000:  # a count
        mean = short(value.mean)
        spread = short(value.std)
    else:
        mean = f"{value.mean:.4g}"
        spread = f"{value.std:.2g}"
    varies = value.std > 0  # neither from one seed nor settled by the settings
    return f"{mean} ± {spread}" if varies else mean


def _shared(outcomes: Outcomes) -> Iterator[str]:
    """Yield how many trials took over what others had computed, where any did."""
    summaries = outcomes.summaries
    takers = Counter(phase for summary in summaries for phase in summary.get("taken_over", ()))
    if takers:
        phases = " and ".join(f"{phase} of {count:,}" for phase, count in takers.items())
        yield (
            f"{phases} of {len(summaries):,} trials are taken over from another one with the same settings, data and"
            " seed; their cost is counted in each."
        )


def _made_by(sweep: SweepFolder) -> str:
    """Return where the figures come from: date, versions, machine."""
    here = environment()
    versions = ", ".join(f"{name} {here['packages'][name]}" for name in ("effray", "torch"))
    date = here["started"].partition("T")[0]
    return f"{len(numbers_of(sweep))} trials, written {date} on {here['processor'] or here['machine']} with {versions}."


def _rich(grid: Grid) -> RichTable:
    """Return a grid for the terminal."""
    table = RichTable(title=grid.title or None, title_justify="left", box=SIMPLE, show_edge=False, pad_edge=False)
    for place, heading in enumerate(grid.headings):
        table.add_column(heading, justify="right" if place else "left", vertical="bottom")
    for place, row in enumerate(grid.rows):
        table.add_row(*row, style="bold" if place in grid.emphasised else None)
    return table

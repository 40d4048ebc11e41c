"""A study as one report, on the terminal, in Markdown and as an HTML page; ``effray report`` for runs too."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from html import escape
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import tomli_w
from pydantic_core import to_json

from raypkg.core.config import dotted, parse_toml
from raypkg.core.errors import UserError, redacted
from raypkg.runs import ROOT
from raypkg.runs.catalog import GOING, STATES, is_study, resuming, state_of
from raypkg.runs.document import Grid, cost_grid, document, findings, link, paragraph, picture, tables, terminal
from raypkg.runs.folder import CONFIG, ENVIRONMENT, Environment, RunFolder, environment
from raypkg.runs.plots import duration, in_full, save_plot, short
from raypkg.runs.storage import Storage

from . import plots
from .outcomes import Estimate, Line, Outcomes, front
from .study import DONE, FOLDER, RESULTS, Row, Study, as_table, find_study, ranked, study_around
from .tables import METRICS, NOT_PAID, PAID, REST, UNKNOWN, Table, stored_table

BEST = "best.toml"
MARKDOWN = "table.md"
PAGE = "report.html"
PLOTS = "plots"
NAMED = 3  # rows in the finding of a comparison, for each verdict
MOST = 1_400_000  # bytes of a page's pictures
VERDICTS = "verdicts.json"
LEGEND = (
    "mean ± standard deviation over seeds; difference from the baseline, seed by seed, with its interval (Student's t,"
    " 95 % for all of the table's together), ! = significant (the interval excludes 0); work = (forward + 2 · backward)"
    " / 3 samples, evaluation excluded; verdict: the difference from the baseline's rows, interpolated at the row's"
    " work, paid or did not pay if its interval excludes 0; Pareto front: of the metric against work"
)
Section = tuple[Grid | None, Sequence[str]]  # a table of a report, and the names of the plots below its title


class Report(NamedTuple):
    """The content of a page."""

    title: str
    finding: str  # a sentence; empty without results
    sections: Sequence[Section]
    lines: Sequence[str]  # below the sections
    notes: Sequence[str]
    results: Sequence[Row] = ()  # one for each trial
    best: Row | None = None  # of the best trial of a sweep
    verdicts: Sequence[Row] = ()  # of a comparison

    @property
    def grids(self) -> list[Grid]:
        """The tables."""
        return [grid for grid, _ in self.sections if grid]


def report_of(study: Study, table: Table | None = None, *, final: bool = False) -> Report:
    """Return the report of a study, for a comparison of ``table`` or all stored rows; a final one draws its plots."""
    if study.order.table:
        return _comparison_report(study, table or stored_table(study.order.table), final)
    return _sweep_report(study, final)


def show_study(study: Study, table: Table | None = None) -> None:
    """Print a study's tables, its failed trials and its findings."""
    console = terminal()
    report = report_of(study, table)
    for grid in report.grids:
        grid.print()
    for line in report.notes:
        console.print(line, style="dim", soft_wrap=True)
    for row in report.results:
        if row["error"]:
            console.print(f"{row['run']} failed: {row['error']}", soft_wrap=True)
    for line in filter(None, [report.finding, *report.lines]):
        console.print(line, soft_wrap=True)
    files = [file for file in (MARKDOWN, RESULTS, PAGE) if file in study.storage.list()]
    console.print(f"{redacted(study.storage.root)}: {', '.join(files)}", style="dim", soft_wrap=True)


def show_resumption(study: Study, root: str) -> None:
    """Print the state of an unfinished study, and the command that resumes it."""
    if left := study.left():
        state = state_of(study.storage)
        terminal().print(f"{study.name}: {left} trials are left, {STATES[state]}", soft_wrap=True)
        if state != GOING:
            terminal().print(f"resume with: {resuming(study.command, study.storage, root)}", soft_wrap=True)


def verdict_on(run: Storage) -> str:
    """Return the verdict on the row of a comparison that a run belongs to, as a line; "" where there is none."""
    study = study_around(run)
    results = study.storage.read_table(RESULTS) if study and study.order.table else None
    if study is None or results is None:
        return ""
    (mine,) = (row for row in results.to_pylist() if row["run"] == run.name)
    for found in study.storage.read_json(VERDICTS) or ():
        if (found["case"], found["row"]) == (mine["case"], mine["row"]):
            where = f"row {found['row']!r} of comparison {study.name!r}"
            return f"{where}: {found['verdict']} over {found['seeds']} seeds"
    return ""


def conclude(study: Study) -> None:
    """Write the results so far: all trials, the best settings, plots, Markdown and the page."""
    report = report_of(study, final=True)
    storage = study.storage
    storage.write_table(RESULTS, as_table(report.results))
    if report.best:
        storage.write(BEST, tomli_w.dumps(study.lasting(report.best["trial"])).encode())
    if report.verdicts:
        storage.write_json(VERDICTS, list(report.verdicts))
    here = environment()
    versions = ", ".join(f"{name} {here['packages'][name]}" for name in ("effray", "torch"))
    date = here["started"].partition("T")[0]
    machine = here["processor"] or here["machine"]
    origin = f"{len(study.numbers())} trials, written {date} on {machine} with {versions}."
    report = report._replace(notes=[*report.notes, origin])

    title, *texts = (escape(text, quote=False) for text in (report.title, report.finding, *report.lines, *report.notes))
    parts = [f"# {title}", *texts[:1], *(grid.markdown() for grid in report.grids), *texts[1:]]
    storage.write(MARKDOWN, ("\n\n".join(filter(None, parts)) + "\n").encode())

    links: dict[str, str] = {}  # to the pages of trials, by name and by number in the table of a sweep
    for row in report.results:
        if PAGE in study.run_storage(row["trial"]).list():
            names = [row["run"]] if study.order.table else [f"{row['trial']}", f"*{row['trial']}"]
            links |= dict.fromkeys(names, f"../../{study.experiment}/{row['run']}/{PAGE}")
    if study.order.table:
        names = ["run", "case", "row", "seed", "state", study.order.metric]
        runs = [[in_full(row.get(name)) for name in names] for row in report.results]
        report = report._replace(sections=[*report.sections, (Grid("Runs", names, runs), ())])
    report = report._replace(title=f"{study.name}: {report.title}")
    storage.write(PAGE, _page(report, storage, study.config, links).encode())


def write_page(folder: RunFolder) -> str:
    """Write the page of a finished run, or those of a study, as it stands, and its trials; return the page's path."""
    storage = folder.storage
    if is_study(storage):
        study = Study(storage)
        for run in (study.run(number) for number in range(len(study.trials))):
            if run.summary:
                run.storage.write(PAGE, run_page(run).encode())
        conclude(study)
    else:
        storage.write(PAGE, run_page(folder).encode())
    return f"{storage.root}/{PAGE}"


def written(folder: RunFolder, form: str) -> str:
    """Return the tables of a finished run or of a study as Markdown, LaTeX or CSV, or its figures in full as JSON."""
    if is_study(folder.storage):
        report = report_of(Study(folder.storage))
        content: Any = {"title": report.title, "trials": report.results, "verdicts": report.verdicts}
    else:
        report = _run_report(folder)
        content = folder.summary
    if form == "json":
        return to_json(content, indent=2, inf_nan_mode="null", fallback=str).decode()
    return "\n\n".join(getattr(grid, form)() for grid in report.grids)


def load_study(name: str, root: str = ROOT) -> pa.Table:
    """Return the trials of a sweep or comparison, a row each: settings, metrics and costs; see ``to_pandas()``.

    Raises:
        UserError: no such study, or a damaged record.
    """
    return as_table(report_of(find_study(root, name)).results)


def run_page(folder: RunFolder) -> str:
    """Return the page of a finished run; raise ``UserError`` if it is not finished."""
    report = _run_report(folder)
    trial_of = ""
    with suppress(UserError):  # the record of its study may be damaged
        if study := study_around(folder.storage):
            trial_of = f"<p>{link(f'trial of {study.name}', f'../../{FOLDER}/{study.name}/{PAGE}')}</p>"
    return _page(report, folder.storage, folder.config, above=trial_of)


def _run_report(folder: RunFolder) -> Report:
    summary = folder.summary
    if summary is None:
        raise UserError(f"run {folder.name!r} is not finished, so there is nothing to report yet: see effray show")
    noted = folder.storage.read_json(ENVIRONMENT, Environment) or {}
    versions = [f"{name} {version}" for name, version in noted.get("packages", {}).items()]
    facts = [noted.get("started"), noted.get("processor"), *versions]
    finding, *lines = findings(summary)
    plots = [file.removesuffix(".png") for file in folder.storage.list(PLOTS)]
    plots.sort(key=lambda name: (not name.startswith("curves"), name))
    costs = cost_grid(f"costs of {folder.name}", summary["phases"])
    grids = [*tables(summary), costs]
    sections: list[Section] = [(None, plots[:1]), *((grid, ()) for grid in grids), (None, plots[1:])]
    title = f"{folder.storage.parent.name} {folder.name}"
    return Report(title, finding, sections, lines, ["; ".join(fact for fact in facts if fact)])


# Sweeps


def _sweep_report(study: Study, final: bool) -> Report:
    metric, mode = study.order.metric, study.order.mode
    runs = study.runs()
    results = study.results(runs)
    in_order = ranked(results, metric, mode)
    done = [row for row in in_order if row["state"] == DONE and row.get(metric) is not None]
    best = done[0] if done else None
    points = {row["trial"]: (row["backward"], row[metric]) for row in done if row.get("backward") is not None}
    on_front = front(points, mode)
    names = list(dict.fromkeys(name for trial in study.trials for name in trial.settings or ()))

    headings = ["trial", "state", "epochs", metric, "samples\nbackward", "seconds"]
    for name in names:
        part, dot, rest = name.rpartition(".")
        headings.append(f"{part}{dot}\n{rest}".lstrip())
    rows = []
    for row in in_order:
        mark = "*" if row["trial"] in on_front else ""
        figures = [in_full(row.get(name)) for name in ("state", "epochs", metric, "backward", "seconds")]
        settings = [_setting(row.get(name)) for name in names]
        rows.append([f"{mark}{row['trial']}", *figures, *settings])
    note = f"* = on the Pareto front of {metric} against samples backward"

    if final:
        curves = {study.run_name(number): run.curve(metric) for number, run in runs.items()}
        best_run = best["run"] if best else None
        save_plot(study.storage, "settings", partial(plots.against_settings, results, names, metric))
        save_plot(study.storage, "curves", partial(plots.learning_curves, curves, metric, best_run))
        if len({cost for cost, _ in points.values()}) > 1:
            save_plot(study.storage, "pareto", partial(plots.pareto, points, on_front, metric))

    finding, lines = "", []
    if best:
        chosen = ", ".join(f"{name} {_setting(best.get(name))}" for name in names)
        finding = f"best: {best['run']}, {metric} {in_full(best[metric])}, of {len(points)} trials; {chosen}"
        if summary := runs[best["trial"]].summary:  # None: the trial ended, or was deleted, after its folder was read
            lines += findings(summary)[:1]
        file = f"{study.storage.root}/{BEST}"
        # A sweep that is running has not written its best settings yet, or has those of an earlier end.
        if not final and parse_toml(study.storage.read(BEST) or b"", file) != study.lasting(best["trial"]):
            file = f"{study.run_storage(best['trial']).root}/{CONFIG}"
        lines += [f"its settings: effray {study.experiment} --config {shlex.quote(redacted(file))}"]
    grid = Grid("Trials", headings, rows, note=note)
    section = (grid, ("settings", "curves", "pareto"))
    return Report(f"a sweep of {study.experiment}", finding, [section], lines, [], results, best)


def _setting(value: Any) -> str:
    """Return a setting as a user types it, without separators."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# Comparisons


def _comparison_report(study: Study, table: Table, final: bool) -> Report:
    outcomes = Outcomes(study, table)
    sections: list[Section] = []
    for number, case in enumerate(outcomes.cases):
        baseline = next(line for line in case.lines if line.row == table.baseline)
        cells = [_cells(table, line, baseline, table.paper.get(case.label, {})) for line in case.lines]
        emphasised = frozenset({case.lines.index(baseline)})
        title = "" if case.label == REST else case.label
        headings = [heading for heading, _ in cells[0]]
        grid = Grid(title, headings, [[cell for _, cell in row] for row in cells], emphasised)
        bars, curves = f"rows-{number:02d}", f"curves-{number:02d}"
        sections.append((grid, (bars, curves)))
        if final:
            save_plot(study.storage, bars, partial(plots.rows_of_case, case, table.metric))
            if any(len(line.curve) > 1 for line in case.lines):
                save_plot(study.storage, curves, partial(plots.curves_of_case, case))

    lines = []
    summaries = [run.summary for run in outcomes.runs.values() if run.summary]
    if takers := Counter(phase for summary in summaries for phase in summary.get("taken_over", ())):
        phases = " and ".join(f"{phase} of {count:,}" for phase, count in takers.items())
        source = "another one with the same settings, data and seed"
        cost = "their cost is counted in each"
        lines = [f"{phases} of {len(summaries):,} trials are taken over from {source}; {cost}."]
    seeds = ", ".join(map(str, table.seeds))
    title = f"{table.title} ({study.order.asked}, {study.order.scale} scale)"
    notes = [f"Seeds {seeds}; {LEGEND}."]
    verdicts = outcomes.verdicts()
    return Report(title, _finding(outcomes, verdicts), sections, lines, notes, [*outcomes.records()], verdicts=verdicts)


def _finding(outcomes: Outcomes, verdicts: Sequence[Row]) -> str:
    """Return the best row of the only case and the verdicts, as a sentence."""
    table = outcomes.table
    parts = []
    if len(outcomes.cases) == 1:
        measured = [line for line in outcomes.cases[0].lines if line.value]
        sign = 1 if METRICS[table.metric].mode == "max" else -1
        best = max(measured, key=lambda line: sign * line.value.mean if line.value else 0, default=None)
        if best:
            metric = table.metric.replace("_", " ")
            parts.append(f"best {metric}: “{best.row}”, {_estimate(best.value, table.metric)}")
    at = f"by {table.gain}" if table.gain else "at equal work"
    for word in (PAID, NOT_PAID):
        found = [each for each in verdicts if each["verdict"] == word]
        names = [f"“{each['row']}”" + f" ({each['case']})" * (len(outcomes.cases) > 1) for each in found]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        parts += [f"{at} {', '.join(names[:NAMED])}{more} {word}"] if found else []
    unknown = sum(each["verdict"] == UNKNOWN for each in verdicts)
    parts += [f"{unknown} of {len(verdicts)} verdicts {at} are unknown"] if unknown else []
    return "; ".join(parts)


def _cells(table: Table, line: Line, baseline: Line, published: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the cells of a row with their headings."""
    metric = table.metric
    some = "" if len(line.seeds) == len(table.seeds) else f" ({len(line.seeds)})"
    difference = "–"
    if line.difference:
        mean, half = line.difference
        difference = _signed(mean, metric)
        if not math.isnan(half):  # of one seed
            difference += f" ± {_signed(half, metric).lstrip('+')}"
        if abs(mean) > half:
            difference += " !"
    verdict = line.verdict.word if line.verdict else "–"
    if line.verdict and not math.isnan(line.verdict.mean):
        verdict += f" {_signed(line.verdict.mean, table.gain or metric)}"
    mean_costs = {name: cost.mean for name, cost in line.costs.items()}  # none of a row without a finished run
    ratio = "–"
    if line.costs and baseline.costs and baseline.costs["work"].mean:
        ratio = f"{line.costs['work'].mean / baseline.costs['work'].mean:.2f}"
    cells = [
        ("row", line.row),
        (metric.replace("_", " "), _estimate(line.value, metric) + some),
        (f"against\n{table.baseline}", difference),
        (f"verdict by\n{table.gain}" if table.gain else "verdict at\nequal work", verdict),
        ("samples\nforward", short(mean_costs.get("forward", math.nan))),
        ("samples\nbackward", short(mean_costs.get("backward", math.nan))),
        ("work", short(mean_costs.get("work", math.nan))),
        ("work:\nbaseline", ratio),
        ("seconds", duration(mean_costs.get("seconds", math.nan))),
        ("MiB", f"{mean_costs['memory'] / 2**20:,.0f}" if mean_costs else "–"),
    ]
    for (name, goal), reached in line.goals.items():
        value = f"{100 * goal:g} %" if plots.is_share(name) else f"{goal:g}"
        part = "" if reached.seeds == reached.of else f" ({reached.seeds} of {reached.of})"
        spent = reached.backward.mean if reached.backward else math.nan
        cells.append((f"backward to\n{name} {value}", short(spent) + part))
    cells += [(heading, _estimate(figure, "")) for heading, figure in line.columns.items()]
    if table.rates:
        cells.append(("rate", _setting(line.rate)))
    cells.append(("Pareto\nfront", "yes" if line.on_front else ""))
    if published:
        cells.append(("published", str(published.get(line.row, "–"))))
    return cells


def _estimate(value: Estimate | None, metric: str) -> str:
    """Return mean ± standard deviation of a metric, accuracies in per cent."""
    if value is None:
        return "–"
    if plots.is_share(metric):
        spread = "" if math.isnan(value.spread) else f" ± {100 * value.spread:.2f}"
        return f"{100 * value.mean:.2f}{spread} %"
    is_count = abs(value.mean) >= 1000
    mean = short(value.mean) if is_count else f"{value.mean:.4g}"
    spread = short(value.spread) if is_count else f"{value.spread:.2g}"
    # NaN for one seed; 0 where the settings alone determine the figure.
    return f"{mean} ± {spread}" if value.spread > 0 else mean


def _signed(value: float, metric: str) -> str:
    return f"{100 * value:+.2f}" if plots.is_share(metric) else f"{value:+.3g}"


# The page


def _page(
    report: Report,
    storage: Storage,
    config: Mapping[str, Any],
    links: Mapping[str, str] = MappingProxyType({}),
    above: str = "",
) -> str:
    """Return a report as HTML with its settings; ``links`` are of first cells, and ``above`` is HTML.

    Plots are embedded while they stay below ``MOST`` bytes in all, then linked.
    """
    left = MOST
    parts = [above, paragraph(report.finding, "finding")]
    for grid, names in report.sections:
        pictures = []
        for name in names:
            file = f"{PLOTS}/{name}.png"
            path = storage.local / file if storage.local else None
            if path and (path.parent.is_symlink() or path.is_symlink() or (path.exists() and not path.is_file())):
                pictures.append(paragraph(f"{file} is not a regular file of this folder, so it is not embedded."))
            elif png := storage.read(file):
                left -= len(png)
                title = ", ".join(filter(None, [name, grid and grid.title]))
                pictures.append(picture(png, title) if left >= 0 else f"<p>{link(file, file)}</p>")
        parts += [grid.html("".join(pictures[:1]), links), *pictures[1:]] if grid else pictures
    parts += [paragraph(line) for line in report.lines]
    parts += [paragraph(note, "note") for note in report.notes]
    settings = [[name, _setting(value)] for name, value in dotted(config).items()]
    parts.append(Grid("Settings", ["setting", "value"], settings).html())
    return document(report.title, parts)

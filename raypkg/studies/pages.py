"""`effray report`: a run, a sweep or a comparison as one HTML page, with its pictures inside."""

from collections.abc import Iterator, Mapping
from typing import Any

from raypkg.core.config import dotted
from raypkg.core.errors import UserError
from raypkg.runs.document import Grid, document, paragraph, picture
from raypkg.runs.folder import RunFolder
from raypkg.runs.show import findings
from raypkg.runs.storage import Storage
from raypkg.runs.style import duration, in_full

from .comparison_show import PAGE, conclude_comparison
from .standing import standing_of
from .sweep_folder import SweepFolder, is_sweep

PLOTS = "plots"


def write_page(folder: RunFolder) -> str:
    """Write the page of a finished run, or of a sweep or comparison as it stands, into its folder; return its path.

    Raises:
        UserError: the run is not finished, or a file of it is damaged.
    """
    storage = folder.storage
    if is_sweep(storage):
        sweep = SweepFolder(storage)
        if sweep.table:
            conclude_comparison(sweep)
        else:
            storage.write(PAGE, sweep_page(sweep).encode())
    else:
        storage.write(PAGE, run_page(folder).encode())
    return f"{storage.root}/{PAGE}"


def run_page(folder: RunFolder) -> str:
    """Return the page of a finished run: what it found and cost, its pictures, its settings.

    Raises:
        UserError: it is not finished.
    """
    summary = folder.summary
    if summary is None:
        raise UserError(f"run {folder.name!r} is not finished, so there is nothing to report yet: see effray show")
    parts = [paragraph(line) for line in findings(summary)]
    parts.append(_costs_grid(summary).html())
    parts += _pictures(folder.storage)
    parts.append(_settings_grid(folder.config).html())
    parts.append(_environment_line(folder.storage))
    return document(f"{folder.storage.parent.name} {folder.name}", parts)


def sweep_page(sweep: SweepFolder) -> str:
    """Return the page of a sweep: its trials, the best first, and its pictures."""
    standing = standing_of(sweep)
    names = list(dict.fromkeys(name for trial in sweep.trials for name in trial["settings"] or ()))
    headings = ["trial", "state", "epochs", sweep.metric, "samples\nbackward", "seconds", *names]
    rows = []
    for row in standing.ranked:
        figures = (row.get(name) for name in ("state", "epochs", sweep.metric, "backward", "seconds"))
        settings = (row.get(name) for name in names)
        mark = "*" if row["trial"] in standing.front else ""
        rows.append([f"{mark}{row['trial']}", *map(in_full, figures), *map(_shown, settings)])
    note = f"* = on the Pareto front of {sweep.metric} against samples backward"
    parts = [paragraph(f"best: {standing.best['run']}")] if standing.best else []
    parts.append(Grid("Trials", headings, rows, note=note).html())
    parts += _pictures(sweep.storage)
    parts.append(_settings_grid(sweep.config, "Settings that all trials share").html())
    return document(f"{sweep.name}: a sweep of {sweep.experiment}", parts)


def _costs_grid(summary: Mapping[str, Any]) -> Grid:
    headings = ["phase", "seconds", "worker-\nseconds", "samples\nforward", "samples\nbackward", "peak\nMiB"]
    rows = []
    for phase in summary["phases"]:
        counts = [f"{phase[name]:,}" for name in ("forward", "backward")]
        seconds = [duration(phase[name]) for name in ("seconds", "total_seconds")]
        rows.append([phase["phase"], *seconds, *counts, f"{phase['memory'] / 2**20:,.0f}"])
    return Grid("What it cost", headings, rows)


def _settings_grid(config: Mapping[str, Any], title: str = "Settings") -> Grid:
    return Grid(title, ["setting", "value"], [[name, _shown(value)] for name, value in dotted(config).items()])


def _pictures(storage: Storage) -> Iterator[str]:
    for file in storage.list(PLOTS):
        if png := storage.read(f"{PLOTS}/{file}"):
            yield picture(png, file.removesuffix(".png"))


def _environment_line(storage: Storage) -> str:
    noted = storage.read_json("environment.json") or {}
    versions = [f"{name} {version}" for name, version in noted.get("packages", {}).items()]
    facts = [noted.get("started"), noted.get("processor"), *versions]
    return paragraph("; ".join(fact for fact in facts if fact))


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""A run as tables on the terminal: the costs and results of a finished one, the progress of an unfinished one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from .document import Grid
from .folder import RunFolder
from .report import utilisation

INDENT = 2 * "\N{NO-BREAK SPACE}"


def _count(samples: int) -> str:
    return f"{samples:,}" if samples < 10**8 else f"{samples / 1e6:,.0f} M"  # at most ten characters


COLUMNS: Sequence[tuple[str, str, Callable[[Any], str], Callable[[Sequence[Any]], Any]]] = (
    # Headings of two lines, so that the table fits 80 columns; figure, format, and the figure of the whole run.
    ("seconds", "seconds", "{:,.1f}".format, sum),
    ("worker\nseconds", "total_seconds", "{:,.1f}".format, sum),
    ("samples\nforward", "forward", _count, sum),
    ("samples\nbackward", "backward", _count, sum),
    ("MB\nsent", "sent", lambda size: f"{size / 1e6:,.1f}", sum),
    ("peak\nMiB", "memory", lambda size: f"{size / 2**20:,.0f}", max),
    ("GPU\nMiB", "device_memory", lambda size: f"{size / 2**20:,.0f}", max),
)


def show_run(folder: RunFolder, console: Console) -> None:
    """Print a finished run's results below a row for the costs of each phase and the totals."""
    summary = folder.summary or {}
    cost_grid(folder.name, summary["phases"]).print()
    for line in findings(summary):
        console.print(line)
    for grid in tables(summary):
        grid.print()
    console.print(folder.storage.root, style="dim", soft_wrap=True)


def cost_grid(title: str, phases: Sequence[Mapping[str, Any]]) -> Grid:
    """Return the costs of a finished run's phases and of their parts, and the totals in the last row."""
    headings = ["phase"]
    names = []
    for phase in phases:
        name, _, part = phase["phase"].partition(": ")
        names.append(f"{INDENT}{part}" if part else name)
    columns = [names]
    totals = ["all"]
    for heading, key, form, total in COLUMNS:
        values = [phase.get(key, 0) for phase in phases] or [0]
        if key == "device_memory" and not any(values):
            continue
        headings.append(heading)
        columns.append([form(value) for value in values])
        totals.append(form(total(values)))
    rows = [*zip(*columns, strict=False)]
    return Grid(title, headings, rows, totals=totals)


def findings(summary: Mapping[str, Any]) -> list[str]:
    """Return a finished run's results in plain lines, the main one first: test, findings of its methods, time."""
    phases = summary["phases"]
    samples, coreset = summary["samples"], summary["coreset"]
    chosen = f"all {samples:,} samples"
    if coreset is not None:
        chosen = f"{coreset:,} of {samples:,} samples ({coreset / samples:.1%})"
    lines = []
    if "test_accuracy" in summary:
        full = summary["full_training_backward"]
        backward = sum(phase["backward"] for phase in phases)
        accuracy, loss = summary["test_accuracy"], summary["test_loss"]
        tested = f"test accuracy {accuracy:.2%} (loss {loss:.3f})"
        if "test_perplexity" in summary:
            first = f"first answered token right {accuracy:.2%}"
            tested = f"test perplexity {summary['test_perplexity']:.2f} (loss {loss:.3f} per answered token, {first})"
        if "test_metric" in summary:
            tested += f", metric {summary['test_metric']:.4g}"
        lines.append(f"{tested}, trained on {chosen}")
        lines.append(f"{backward:,} samples backward, {100 * backward / full:.1f} % of full training ({full:,})")
    elif coreset is not None:
        lines.append(f"selected {chosen}: coreset.parquet; train on it with `effray train --coreset`")
    waited = sum(phase.get("waited", 0) for phase in phases)  # missing in runs of earlier versions
    lines += summary.get("findings", [])
    compute = f"compute {summary['seconds']:.1f} s ({waited:.1f} s waiting for data)"
    trained = [phase for phase in phases if phase["backward"]]
    if seconds := sum(phase.get("seconds", 0) for phase in trained):
        compute += f", {sum(phase['backward'] for phase in trained) / seconds:,.0f} samples/s in training"
    if share := utilisation(trained):
        compute += f", MFU {share:.1%}"
    return [*lines, f"{compute}; wall time {summary['elapsed']:.1f} s including start-up and I/O"]


def tables(summary: Mapping[str, Any]) -> list[Grid]:
    """Return the tables of a finished run's own, such as an audit's worst samples."""
    return [Grid(**table) for table in summary.get("tables", ())]

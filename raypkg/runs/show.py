"""A run as tables on the terminal: its costs, phase by phase, and its results."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from raypkg.core.errors import redacted

from .folder import RunFolder


def terminal() -> Console:
    """Return the console of this process, which prints names and paths as they are: no markup, no emoji."""
    return Console(markup=False, emoji=False, highlight=False)


def show_run(folder: RunFolder, console: Console) -> None:
    """Print a finished run's costs and results, or how far a running one is."""
    summary = folder.summary
    if summary is None:
        _show_progress(folder, console)
        return
    console.print(_costs(folder.name, summary["phases"]))
    for line in findings(summary):
        console.print(line)
    console.print(redacted(folder.storage.root), style="dim", soft_wrap=True)


def findings(summary: Mapping[str, Any]) -> list[str]:
    """Return a finished run's results in plain lines: what every run has, then what its methods found."""
    lines = [*_results(summary)]
    lines.append(
        f"{summary['seconds']:.1f} s of work on the critical path; {summary['elapsed']:.1f} s with starting workers,"
        " importing and storing (of a resumed run: each phase's last attempt)"
    )
    return lines + summary.get("findings", [])


def _results(summary: Mapping[str, Any]) -> Iterator[str]:
    chosen = _chosen(summary)
    if "test_accuracy" not in summary:
        yield f"selected {chosen}: coreset.parquet; train on it with `effray train --coreset`"
        return
    full = summary["full_training_backward"]
    backward = sum(phase["backward"] for phase in summary["phases"])
    yield f"test accuracy {summary['test_accuracy']:.2%} (loss {summary['test_loss']:.3f}), trained on {chosen}"
    yield f"samples backward {backward:,}: {backward / full:.1%} of as many epochs on all samples ({full:,})"


def _chosen(summary: Mapping[str, Any]) -> str:
    samples = summary["samples"]
    coreset = summary["coreset"]
    if coreset is None:
        return f"all {samples:,} samples"
    return f"{coreset:,} of {samples:,} samples ({coreset / samples:.1%})"


COLUMNS = (  # two lines of heading, so that the table fits 80 columns
    ("\nseconds", "seconds", "{:,.1f}"),
    ("worker-\nseconds", "total_seconds", "{:,.1f}"),
    ("samples\nforward", "forward", "{:,}"),
    ("samples\nbackward", "backward", "{:,}"),
)


def _costs(title: str, phases: Sequence[Mapping[str, Any]]) -> Table:
    """Return the bill of every phase as a row, with the sums below; of memory, the largest."""
    table = Table(title=title, title_justify="left", show_footer=True, box=SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("\nphase", footer="all")
    for heading, key, form in COLUMNS:
        total = sum(phase[key] for phase in phases)
        table.add_column(heading, justify="right", footer=form.format(total))
    sent = sum(phase["sent"] for phase in phases)
    memory = max((phase["memory"] for phase in phases), default=0)
    table.add_column("MB\nsent", justify="right", footer=_megabytes(sent))
    table.add_column("peak\nMiB", justify="right", footer=_mebibytes(memory))
    device_memory = max((phase.get("device_memory", 0) for phase in phases), default=0)
    if device_memory:
        table.add_column("GPU\nMiB", justify="right", footer=_mebibytes(device_memory))
    for phase in phases:
        name, _, part = phase["phase"].partition(": ")
        figures = [form.format(phase[key]) for _, key, form in COLUMNS]
        figures += [_megabytes(phase["sent"]), _mebibytes(phase["memory"])]
        if device_memory:
            figures.append(_mebibytes(phase["device_memory"]))
        table.add_row(f"  {part}" if part else name, *figures)
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def _show_progress(folder: RunFolder, console: Console) -> None:
    console.print(f"{folder.name}: not finished")
    table = Table("phase", "epochs", "loss", "accuracy")
    for phase in dict.fromkeys(row["phase"] for row in folder.rows):
        rows = [row for row in folder.rows if row["phase"] == phase]
        measured = [row["accuracy"] for row in rows if "accuracy" in row]
        accuracy = f"{measured[-1]:.1%}" if measured else "–"
        table.add_row(phase, str(len(rows)), f"{rows[-1]['loss']:.3f}", accuracy)
    console.print(table)

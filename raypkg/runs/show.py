"""A run as tables on the terminal: its costs, phase by phase, and its results; or how far it is."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from raypkg.core.errors import UserError, redacted

from .activity import DONE, GOING, STOPPED, UNFINISHED, ago, written
from .folder import RunFolder
from .stages import Reached, Stage, reached
from .storage import Storage

STATES = {
    GOING: "a process is working on it",
    STOPPED: "nobody is working on it",
    UNFINISHED: "and whether anybody is working on it cannot be told here: there are no locks",
}


def terminal() -> Console:
    """Return the console of this process, which prints names and paths as they are: no markup, no emoji."""
    return Console(markup=False, emoji=False, highlight=False)


def show_run(folder: RunFolder, console: Console) -> None:
    """Print a finished run's costs and results."""
    summary = folder.summary or {}
    console.print(_costs(folder.name, summary["phases"]))
    for line in findings(summary):
        console.print(line)
    console.print(redacted(folder.storage.root), style="dim", soft_wrap=True)


def findings(summary: Mapping[str, Any]) -> list[str]:
    """Return a finished run's results in plain lines: what every run has, then what its methods found."""
    lines = [*_results(summary)]
    waited = sum(phase.get("waited", 0) for phase in summary["phases"])  # runs of earlier versions have none
    lines.append(
        f"{summary['seconds']:.1f} s of work on the critical path, {waited:.1f} s of them without a batch to work on;"
        f" {summary['elapsed']:.1f} s with starting workers, importing and storing (of a resumed run: each phase's last"
        " attempt)"
    )
    return lines + summary.get("findings", [])


def _results(summary: Mapping[str, Any]) -> Iterator[str]:
    chosen = _chosen(summary)
    if "test_accuracy" not in summary:
        if summary["coreset"] is not None:
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


def _time(seconds: float) -> str:
    return f"{seconds:,.1f}"


def _count(samples: int) -> str:
    """Return a count in at most ten characters."""
    return f"{samples:,}" if samples < 10**8 else f"{samples / 1e6:,.0f} M"


COLUMNS = (  # two lines of heading, so that the table fits 80 columns
    ("\nseconds", "seconds", _time),
    ("worker-\nseconds", "total_seconds", _time),
    ("samples\nforward", "forward", _count),
    ("samples\nbackward", "backward", _count),
)


def _costs(title: str, phases: Sequence[Mapping[str, Any]]) -> Table:
    """Return the bill of every phase as a row, with the sums below; of memory, the largest."""
    table = Table(title=title, title_justify="left", show_footer=True, box=SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("\nphase", footer="all")
    for heading, key, form in COLUMNS:
        total = sum(phase[key] for phase in phases)
        table.add_column(heading, justify="right", footer=form(total))
    sent = sum(phase["sent"] for phase in phases)
    memory = max((phase["memory"] for phase in phases), default=0)
    table.add_column("MB\nsent", justify="right", footer=_megabytes(sent))
    table.add_column("peak\nMiB", justify="right", footer=_mebibytes(memory))
    device_memory = max((phase.get("device_memory", 0) for phase in phases), default=0)
    if device_memory:
        table.add_column("GPU\nMiB", justify="right", footer=_mebibytes(device_memory))
    for phase in phases:
        name, _, part = phase["phase"].partition(": ")
        figures = [form(phase[key]) for _, key, form in COLUMNS]
        figures += [_megabytes(phase["sent"]), _mebibytes(phase["memory"])]
        if device_memory:
            figures.append(_mebibytes(phase["device_memory"]))
        table.add_row(f"  {part}" if part else name, *figures)
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def show_unfinished(folder: RunFolder, stages: Sequence[Stage], state: str, resume: str, console: Console) -> None:
    """Print how far a run is that is not done: each phase, when its newest file was written, and how to go on.

    Args:
        folder: of the run.
        stages: what its phases are to do, as far as is known.
        state: it is in.
        resume: the command that resumes it, or why nothing does.
        console: where to print.
    """
    console.print(f"{folder.name}: not finished, {STATES[state]}", soft_wrap=True)
    console.print(_progress(reached(folder, stages), state))
    for line in last_signs(folder.storage):
        console.print(line, soft_wrap=True)
    if state != GOING:
        console.print(f"resume with: {resume}", soft_wrap=True)
    console.print(redacted(folder.storage.root), style="dim", soft_wrap=True)


def last_signs(storage: Storage) -> Iterator[str]:
    """Yield which file of a folder is the newest, and how long ago it was written."""
    try:
        times = written(storage.root, below=True)
    except UserError:  # a run that is going deletes folders as well, also while they are listed
        return
    if times:
        newest = max(times, key=times.__getitem__)
        yield f"last written {ago(times[newest])} ago: {newest}"


def _progress(phases: Sequence[Reached], state: str) -> Table:
    """Return a row for each phase: its state, and how much of what it is to do it has done."""
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    for name in ("phase", "state"):
        table.add_column(name)
    for name in ("models", "epochs", "loss", "accuracy"):
        table.add_column(name, justify="right")
    present = next((phase for phase in phases if not phase.done), None)
    for phase in phases:
        stage = phase.stage
        standing = state if phase is present else "to come"
        losses = [row["loss"] for row in phase.rows if "loss" in row]
        measured = [row["accuracy"] for row in phase.rows if "accuracy" in row]
        table.add_row(
            stage.phase,
            DONE if phase.done else standing,
            f"{phase.models_done} of {stage.models}" if stage.models > 1 else "–",
            _of(len(phase.rows), stage.rows),
            f"{losses[-1]:.3f}" if losses else "–",
            f"{measured[-1]:.1%}" if measured else "–",
        )
    return table


def _of(count: int, total: int) -> str:
    """Return so many of a total that may not be known."""
    if total:
        return f"{count:,} of {total:,}"
    return f"{count:,}" if count else "–"

"""Where a run's progress goes: the folder, the terminal and the tracker, from one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from .pace import Pace, in_words

if TYPE_CHECKING:  # they import pyarrow, which `--help` need not wait for
    from .folder import RunFolder
    from .tracking import Tracker


class Phase(NamedTuple):
    """A phase that is being followed.

    Attributes:
        rows: of metrics that are to come.
        models: that they are of, each the same number; 1 where they have no number, or it is not known how many.
        pace: of the rows.
        task: its bar.
    """

    rows: int
    models: int
    pace: Pace
    task: TaskID


class Report:
    """Takes the rows of a run and keeps, shows and tracks them; remembers finished phases.

    On a terminal every phase is a moving bar; elsewhere it is a few lines of text.

    Args:
        folder: of the run.
        tracker: of the metrics.
        console: where progress is shown.
    """

    def __init__(self, folder: RunFolder, tracker: Tracker, console: Console):
        self.folder = folder
        self._tracker = tracker
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._phases: dict[str, Phase] = {}
        self.records: dict[str, dict[str, Any]] = {}  # of the phases so far, in their order

    def __enter__(self) -> Report:
        self._bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()
        self.folder.flush()
        if error:
            self._tracker.abandon()

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Take a row of metrics from a worker; one that is known, of an epoch before a restart, is only counted."""
        is_new = self.folder.log(row)
        if is_new:
            self._tracker.log(row)
        phase = self._phases.get(row["phase"])
        if phase:
            phase.pace.take(row, is_new, time.perf_counter())
            self._show(phase, row, is_new)

    def phase(self, name: str, work: Callable[[], dict[str, Any]], *, epochs: int, models: int = 1) -> dict[str, Any]:
        """Do a phase's work and keep its record, or return the record of an earlier attempt.

        Args:
            name: of the phase, as in its rows.
            work: returns plain values, with the bills under ``costs``.
            epochs: how many rows to expect, of all models together.
            models: that the rows are of.
        """
        task = self._bars.add_task(name, total=epochs or 1, status="")
        record = self.folder.phase(name)
        if record is None:
            self._say(f"{name} …")
            start = time.perf_counter()
            self._phases[name] = Phase(epochs, models, Pace(epochs, start), task)
            result = work()
            elapsed = time.perf_counter() - start
            record = self.folder.finish_phase(name, {**result, "elapsed": elapsed})
        self._bars.update(task, completed=epochs or 1)
        self._say(f"{name} done in {record['elapsed']:.1f} s")
        self.records[name] = record
        return record

    def say(self, line: str) -> None:
        """Tell the user something that is no metric."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def _show(self, phase: Phase, row: Mapping[str, Any], is_new: bool) -> None:
        """Move the bar; where there is none, print every tenth part of the rows, once."""
        name = row["phase"]
        done = sum(other["phase"] == name for other in self.folder.rows)
        status = "  ".join([*_place(phase, row), *_speed(phase.pace), *_figures(row)])
        self._bars.update(phase.task, completed=done, status=status)
        step = max(1, round(phase.rows / 10))
        if is_new and (done == phase.rows or done % step == 0):
            self._say(f"{name} {done}/{phase.rows or 1}  {status}")

    def _say(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, highlight=False, soft_wrap=True)


def _place(phase: Phase, row: Mapping[str, Any]) -> Iterator[str]:
    """Yield which of several models a row is of, and which of its epochs."""
    model = row.get("model")
    if model is None:
        return
    if phase.models > 1:
        yield f"model {model + 1} of {phase.models}, epoch {row['epoch']} of {phase.rows // phase.models}"
    else:
        yield f"model {model + 1}, epoch {row['epoch']}"


def _speed(pace: Pace) -> Iterator[str]:
    """Yield samples a second and the time that is left, as far as they are known."""
    if pace.rate:
        yield f"{pace.rate:,.0f} samples/s"
    if pace.left:
        yield f"{in_words(pace.left)} left"


def _figures(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield loss and accuracy, where they were measured."""
    if "loss" in row:
        yield f"loss {row['loss']:.3f}"
    if "accuracy" in row:
        yield f"accuracy {row['accuracy']:.1%}"

"""Where a run's progress goes: the folder, the terminal and the tracker, from one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:  # they import pyarrow, which `--help` need not wait for
    from .folder import RunFolder
    from .tracking import Tracker


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
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
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
        if self.folder.log(row):
            self._tracker.log(row)
        status = "  ".join(f"{name} {_shown(name, row[name])}" for name in ("loss", "accuracy") if name in row)
        done = sum(other["phase"] == row["phase"] for other in self.folder.rows)
        self._show(row["phase"], done, status)

    def phase(self, name: str, work: Callable[[], dict[str, Any]], *, epochs: int) -> dict[str, Any]:
        """Do a phase's work and keep its record, or return the record of an earlier attempt.

        Args:
            name: of the phase, as in its rows.
            work: returns plain values, with the bills under ``costs``.
            epochs: how many rows to expect.
        """
        self._tasks[name] = self._bars.add_task(name, total=epochs or 1, status="")
        record = self.folder.phase(name)
        if record is None:
            self._say(f"{name} …")
            start = time.perf_counter()
            result = work()
            elapsed = time.perf_counter() - start
            record = self.folder.finish_phase(name, {**result, "elapsed": elapsed})
        self._bars.update(self._tasks[name], completed=epochs or 1)
        self._say(f"{name} done in {record['elapsed']:.1f} s")
        self.records[name] = record
        return record

    def say(self, line: str) -> None:
        """Tell the user something that is no metric."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def _show(self, phase: str, done: int, status: str) -> None:
        if phase in self._tasks:
            self._bars.update(self._tasks[phase], completed=done, status=status)
            total = self._bars.tasks[self._tasks[phase]].total or 1
            if done == total or done % max(1, round(total / 10)) == 0:
                self._say(f"{phase} {done}/{total:.0f}  {status}")

    def _say(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, highlight=False)


def _shown(name: str, value: float) -> str:
    return f"{value:.1%}" if name == "accuracy" else f"{value:.3f}"

"""Phases of a run: what each will do, and its progress while the run is going."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from math import ceil
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import progress
from rich.console import Console

from raypkg.core.settings import whole_steps

if TYPE_CHECKING:  # they import pyarrow, which `--help` does not need
    from .folder import RunFolder
    from .tracking import Tracker


SILENCE = 60.0  # seconds without a line, outside a terminal, before the steps of an epoch are printed
Listener = Callable[[Mapping[str, Any]], None]  # receives rows of metrics


class Stage(NamedTuple):
    """Plan of a phase, which trains models for some epochs; without epochs it does something else."""

    phase: str  # its name, as in its rows and its record
    epochs: float = 0  # of each model; the last may not be whole
    models: int = 1
    batch_size: int = 1  # samples of a step
    size: Callable[[int], int] = int  # samples in an epoch of one model, for n training samples
    whole: int = 0  # first epochs, on all samples
    files: tuple[str, ...] = ()  # in the run folder, besides those of methods and hooks
    # Names of all settings, or of their parts, that determine the phase and those before it, such as ("seed",
    # "select.rule"). A run with the same values may take the phases over. () = unknown, or not possible.
    depends_on: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Number of rows of metrics."""
        return self.models * ceil(self.epochs)

    def steps(self, n: int) -> int:
        """Return the steps of all models, in a run with n training samples.

        >>> Stage("train", epochs=5, batch_size=128, size=lambda n: n // 10, whole=2).steps(1000)
        19
        """
        on_all, on_part = (-(-size // self.batch_size) for size in (n, self.size(n)))
        return self.models * (self.whole * on_all + whole_steps(self.epochs - self.whole, on_part))

    def backward(self, n: int) -> int:
        """Return the samples that all models back-propagate, in a run with n training samples.

        >>> Stage("train", epochs=5, size=lambda n: n // 10, whole=2).backward(1000)
        2300
        """
        size = self.size(n)
        per_epoch = max(1, -(-size // self.batch_size))
        epochs, rest = divmod(whole_steps(self.epochs - self.whole, per_epoch), per_epoch)
        in_rest = rest * (size // per_epoch) + min(rest, size % per_epoch)  # batches are as even as possible
        return self.models * (self.whole * n + epochs * size + in_rest)

    def settings_in(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings, by dotted names, that the phase depends on.

        >>> stage = Stage("select", depends_on=("dataset", "select.rule"))
        >>> stage.settings_in({"dataset.noise": 0.4, "select.rule": "craig", "select.every_epochs": 5})
        {'dataset.noise': 0.4, 'select.rule': 'craig'}
        """
        parts = tuple(f"{part}." for part in self.depends_on)
        return {name: value for name, value in values.items() if f"{name}.".startswith(parts)}


def utilisation(bills: Iterable[Mapping[str, Any]]) -> float:
    """Return the operations of training as a share of those at the peak of the GPUs (MFU, arXiv:2204.02311), or 0.

    >>> utilisation([{"operations": 4e12, "total_seconds": 2.0, "peak": 10e12}, {"total_seconds": 1.0}])
    0.2
    """
    known = [bill for bill in bills if bill.get("peak")]
    possible = sum(bill["total_seconds"] * bill["peak"] for bill in known)
    return sum(bill["operations"] for bill in known) / possible if possible else 0.0


class Report:
    """Stores, shows and tracks the rows of a run, and remembers its finished phases.

    On a terminal each phase is a progress bar; elsewhere it is a few lines of text. ``listen`` receives new rows too,
    and may stop the run there by ``SystemExit``, as a study does with a poor trial.
    """

    def __init__(self, folder: RunFolder, tracker: Tracker | None, console: Console, listen: Listener | None = None):
        self.folder = folder
        self._tracker = tracker
        self._listen = listen
        self._console = console
        self._progress = progress.Progress(
            progress.TextColumn("{task.description:<9}"),
            progress.BarColumn(bar_width=12),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
            # The mean since the first row: starting workers is no part of it, and an epoch may take longer than rich's
            # usual 30 s. Disabled bars measure it as well, for the lines of text.
            speed_estimate_period=float("inf"),
        )
        self._said = console.get_time()  # when the last line was printed
        self._tasks: dict[str, progress.Task] = {}  # of the phases in progress
        self.records: dict[str, dict[str, Any]] = {}  # of the phases so far, in their order

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        self.folder.flush()
        if error and self._tracker:
            self._tracker.finish(None)

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Take a row of metrics from a worker. A row that is known from before a restart is only counted.

        The bill so far, under ``bill``, is shown and tracked, not stored: rows are the same whatever the time. A row
        with the number of steps ``within`` an unfinished epoch is only shown, on a terminal; elsewhere now and then.
        """
        if "within" in row:
            if task := self._tasks.get(row["phase"]):
                model = f"model {row['model'] + 1}, " if row.get("model") is not None else ""
                status = f"{model}epoch {row['epoch']}: step {row['within']:,} of {row['steps']:,}"
                self._progress.update(task.id, status=status)
                if self._console.get_time() - self._said >= SILENCE:
                    self._say_without_bars(f"{row['phase']}  {status}")
            return
        bill = row.get("bill", {})
        row = {name: value for name, value in row.items() if name != "bill"}
        is_new = self.folder.log(row)
        if is_new and self._tracker:
            self._tracker.log({**bill, **row})
        if is_new and self._listen:
            try:
                self._listen(row)
            except SystemExit:
                if self._tracker:  # a stopped trial has not failed
                    self._tracker.finish({})
                    self._tracker = None
                raise
        name = row["phase"]
        if name not in self._tasks:
            return
        task = self._tasks[name]
        rows = [other for other in self.folder.rows if other["phase"] == name]
        self._progress.update(task.id, completed=len(rows))
        status = self._status(row, bill, task, rows)
        self._progress.update(task.id, status=status)
        step = max(1, round((task.total or 1) / 10))
        if is_new and not self._console.is_terminal and (len(rows) == task.total or len(rows) % step == 0):
            times = [f"{timedelta(seconds=round(task.elapsed or 0))} elapsed"]
            if task.time_remaining:
                times.append(f"{timedelta(seconds=round(task.time_remaining))} left")
            self.say(f"{name} {len(rows)}/{task.total:.0f}  {'  '.join(times)}  {status}")

    def _status(
        self, row: Mapping[str, Any], bill: Mapping[str, Any], task: progress.Task, rows: list[dict[str, Any]]
    ) -> str:
        """Return the model and its epoch, if there are several models, then throughput, loss and held-out figures."""
        parts = []
        models, model = task.fields["models"], row.get("model")
        if model is not None and models > 1:
            epochs = round((task.total or 0) / models)
            parts.append(f"model {model + 1} of {models}, epoch {row['epoch']} of {epochs}")
        elif model is not None:
            parts.append(f"model {model + 1}, epoch {row['epoch']}")
        if task.speed:
            backward = {each.get("model"): each.get("backward", 0) for each in rows}  # up to each model's last epoch
            parts.append(f"{task.speed * sum(backward.values()) / len(rows):,.0f} samples/s")
        if bill and bill["waited"] >= 0.01 * bill["seconds"]:
            parts.append(f"{bill['waited'] / bill['seconds']:.0%} waiting")
        if share := utilisation([bill]):
            parts.append(f"MFU {share:.0%}")
        if bill.get("device_memory"):
            parts.append(f"GPU {bill['device_memory'] / 2**20:,.0f} MiB")
        if "loss" in row:
            parts.append(f"loss {row['loss']:.3f}")
        if "perplexity" in row:
            parts.append(f"perplexity {row['perplexity']:.2f}")
        elif "accuracy" in row:
            parts.append(f"accuracy {row['accuracy']:.1%}")
        if "metric" in row:
            parts.append(f"metric {row['metric']:.4g}")
        return "  ".join(parts)

    def phase(self, name: str, work: Callable[[], dict[str, Any]], *, epochs: int, models: int = 1) -> dict[str, Any]:
        """Do a phase's work and store its record, or return the record of an earlier attempt.

        ``work`` returns plain values, with the costs under ``costs``. ``epochs`` are those of all models together: the
        expected number of rows.
        """
        task = self._progress.add_task(name, total=epochs or 1, status="", models=models)
        record = self.folder.phase(name)
        if record is None:
            self._say_without_bars(f"{name} …")
            start = time.perf_counter()
            self._tasks[name] = self._progress.tasks[-1]
            result = work()
            elapsed = time.perf_counter() - start
            record = self.folder.finish_phase(name, {**result, "elapsed": elapsed})
        self._progress.update(task, completed=epochs or 1)
        self._say_without_bars(f"{name} done in {record['elapsed']:.1f} s")
        self.records[name] = record
        return record

    def say(self, line: str) -> None:
        """Print a line that is not a metric."""
        self._said = self._console.get_time()
        self._console.print(line, highlight=False, soft_wrap=True)

    def _say_without_bars(self, line: str) -> None:
        if not self._console.is_terminal:
            self.say(line)

"""The figures of a trial: what its run folder holds at one moment, read once."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from raypkg.runs.folder import RunFolder


class Metric(NamedTuple):
    """A figure of a run: which way it is better, whether every epoch has it or the end alone, and of what it is."""

    mode: str
    each_epoch: bool
    held_out: bool = False


METRICS = {
    "accuracy": Metric("max", True, held_out=True),
    "valid_loss": Metric("min", True, held_out=True),
    "train_accuracy": Metric("max", True),
    "loss": Metric("min", True),
    "test_accuracy": Metric("max", False),
    "test_loss": Metric("min", False),
    "seconds": Metric("min", False),
    "backward": Metric("min", False),  # samples back-propagated, over all phases
}


class TrialRun:
    """What the run folder of a trial holds.

    Args:
        folder: of the run, which may not exist yet.

    Attributes:
        rows: metrics of the main training.
        epochs: that it has had.
        summary: the manifest of a run that is done, or None.
    """

    def __init__(self, folder: RunFolder):
        self.rows = [row for row in folder.rows if row.get("main")]
        self.epochs: int = max((row["epoch"] for row in self.rows), default=0)
        self.summary = folder.summary
        # Until the summary has the whole bill, what came before the main training is in the records of the phases.
        self._paid_before = 0 if self.summary else _backward_of_phases(folder)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Return epoch and metric, where it was measured."""
        return [(row["epoch"], row[metric]) for row in self.rows if row.get(metric) is not None]

    def figures(self) -> dict[str, Any]:
        """Return the last value of every metric, and how many epochs of the main training there are."""
        last: dict[str, Any] = {"epochs": self.epochs}
        for row in self.rows:
            last |= _metrics_in(row)
        if self.summary:
            last |= _metrics_in(self.summary)
            last["backward"] = sum(phase["backward"] for phase in self.summary["phases"])
        elif "backward" in last:
            last["backward"] += self._paid_before
        return last


def _metrics_in(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in METRICS if values.get(name) is not None}


def _backward_of_phases(folder: RunFolder) -> int:
    """Return the samples that the finished phases of a run have back-propagated."""
    backward = 0
    for file in folder.storage.list("phases"):
        record = folder.phase(file.removesuffix(".json")) or {}
        backward += sum(cost["backward"] for cost in record.get("costs", ()))
    return backward

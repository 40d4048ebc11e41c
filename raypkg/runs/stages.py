"""What the phases of a run are to do, and how far of it a run folder says they are."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .folder import RunFolder


class Stage(NamedTuple):
    """A phase of a run: so many models, each trained for so many epochs; without epochs it does something else.

    Attributes:
        phase: its name, as in its rows and its record.
        epochs: of each model.
        models: that it trains.
        batch_size: samples of a step.
        size: gives the samples in an epoch of one model, for so many training samples.
        whole: first epochs, which are on all samples.
        files: that it leaves in the run folder, whatever methods and hooks add.
        depends_on: names of all settings, or parts of them, that it and the phases before it depend on, such as
            ("seed", "select.rule"): a run with the same may take them over; () = not known, or not to be had alone.
    """

    phase: str
    epochs: int = 0
    models: int = 1
    batch_size: int = 1
    size: Callable[[int], int] = int
    whole: int = 0
    files: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """How many rows of metrics it reports."""
        return self.models * self.epochs

    def steps(self, n: int) -> int:
        """Return the steps of all models, in a run with n training samples.

        >>> Stage("train", epochs=5, batch_size=128, size=lambda n: n // 10, whole=2).steps(1000)
        19
        """
        on_all = -(-n // self.batch_size)
        on_part = -(-self.size(n) // self.batch_size)
        return self.models * (self.whole * on_all + (self.epochs - self.whole) * on_part)

    def backward(self, n: int) -> int:
        """Return the samples that all models back-propagate, in a run with n training samples.

        >>> Stage("train", epochs=5, size=lambda n: n // 10, whole=2).backward(1000)
        2300
        """
        return self.models * (self.whole * n + (self.epochs - self.whole) * self.size(n))

    def settings_in(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of some settings, by dotted names, that the phase depends on.

        >>> stage = Stage("select", depends_on=("dataset", "select.rule"))
        >>> stage.settings_in({"dataset.noise": 0.4, "select.rule": "craig", "select.every_epochs": 5})
        {'dataset.noise': 0.4, 'select.rule': 'craig'}
        """
        parts = tuple(f"{part}." for part in self.depends_on)
        return {name: value for name, value in values.items() if f"{name}.".startswith(parts)}


class Reached(NamedTuple):
    """How far a phase is.

    Attributes:
        stage: what it is to do; of a phase that nobody expected, without epochs.
        done: whether it has left its record.
        rows: of metrics, so far.
    """

    stage: Stage
    done: bool
    rows: Sequence[dict[str, Any]]

    @property
    def models_done(self) -> int:
        """How many models have had their last epoch."""
        if self.done:
            return self.stage.models
        return sum(row["epoch"] == self.stage.epochs for row in self.rows)


def reached(folder: RunFolder, stages: Sequence[Stage]) -> list[Reached]:
    """Return how far each phase is: those that are expected in their order, then any others that have left something.

    Args:
        folder: of the run.
        stages: what its phases are to do, as far as is known.
    """
    rows = folder.rows
    records = [file.removesuffix(".json") for file in folder.storage.list("phases")]
    expected = {stage.phase: stage for stage in stages}
    found = [row["phase"] for row in rows] + records
    names = dict.fromkeys([*expected, *found])
    return [
        Reached(
            stage=expected.get(name, Stage(name)),
            done=name in records,
            rows=[row for row in rows if row["phase"] == name],
        )
        for name in names
    ]

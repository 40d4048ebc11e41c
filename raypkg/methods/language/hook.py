"""Checkpoints of a warm-up: the adapters and Adam's moments at the end of each epoch, and its mean learning rate."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.engine.hooks import Hook
from raypkg.engine.run import Run
from raypkg.experiments.training import Job
from raypkg.runs.checkpoints import load_state, save_state
from raypkg.runs.storage import Storage

from .adapters import trained_linears
from .less import Moments, moments_of

FOLDER = "checkpoints/moments"  # of an unfinished run


class Checkpoint(NamedTuple):
    """One epoch of the warm-up."""

    rate: float  # η, the mean learning rate of the epoch's steps
    weights: Mapping[str, Tensor]  # trained parameters by name
    moments: Mapping[str, Moments]  # by the same names

    @classmethod
    def of(cls, run: Run, rate: float) -> "Checkpoint":
        """Return the present state of a run, on the CPU."""
        moments = moments_of(run.model, run.optimizer)
        weights = {name: w.detach().to("cpu", copy=True) for name, w in run.model.named_parameters() if w.requires_grad}
        return cls(rate, weights, moments)

    def restore(self, model: nn.Module) -> None:
        """Overwrite a model's trained parameters."""
        model.load_state_dict(self.weights, strict=False)


def save_checkpoint(storage: Storage, number: int, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into a run folder."""
    state = {"rate": checkpoint.rate, "weights": dict(checkpoint.weights)}
    moments = {name: tuple(pair) for name, pair in checkpoint.moments.items()}
    save_state(storage / FOLDER, f"{number:05d}.pt", {**state, "moments": moments})


def load_checkpoint(storage: Storage, number: int) -> Checkpoint:
    """Read a checkpoint of the warm-up."""
    state = load_state(storage / FOLDER, f"{number:05d}.pt")
    if state is None:
        raise UserError(f"{storage.root}/{FOLDER} is damaged: run it again under another name")
    moments = {name: Moments(*pair) for name, pair in state["moments"].items()}
    return Checkpoint(state["rate"], state["weights"], moments)


class Rates(Hook):
    """Averages the learning rate over the steps of each epoch; refuses a model without adapters before the first."""

    priority = 0

    def __init__(self) -> None:
        self.total = 0.0
        self.steps = 0

    def on_start(self, run: Run) -> None:
        """Refuse trained parameters that are not of linear layers."""
        trained_linears(run.model)

    def on_epoch(self, run: Run) -> None:
        """Reset the average."""
        self.total, self.steps = 0.0, 0

    def on_step(self, run: Run) -> None:
        """Count a step."""
        self.total += run.optimizer.param_groups[0]["lr"]
        self.steps += 1

    @property
    def mean(self) -> float:
        """The mean rate of the epoch so far."""
        return self.total / self.steps


class KeepCheckpoints(Rates):
    """Writes a checkpoint at the end of every epoch."""

    def __init__(self, *, job: Job):
        super().__init__()
        self.storage = job.storage

    def on_epoch_end(self, run: Run) -> None:
        """Write it, on rank 0; a resumed run repeats the epoch in progress and overwrites its checkpoint."""
        if run.worker.rank == 0:
            save_checkpoint(self.storage, run.epoch, Checkpoint.of(run, self.mean))

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: every epoch starts from zero."""
        return {}

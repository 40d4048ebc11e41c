"""A hook that records every step's weights and gradient, which DeltaGrad replays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from raypkg.engine.run import Hook, Results, Run, hook
from raypkg.engine.worker import Worker
from raypkg.phases.samples import Samples
from raypkg.phases.training import Job

from .history import Recording
from .recording import layout, version
from .vectors import to_vector


class Sink(Protocol):
    """Where a history goes."""

    digests: list[bytes]

    def cut(self, digests: Sequence[bytes]) -> None:
        """Keep the records of these digests and forget what came after."""

    def append(self, rate: float, w: np.ndarray, gradient: np.ndarray) -> None:
        """Add a step."""

    def flush(self) -> None:
        """Wait until everything is written."""

    def seal(self, w: np.ndarray) -> str:
        """Add the final weights and return the history's digest."""

    def close(self) -> None:
        """Let go of the file."""


class Historian(Hook):
    """Records η, w_t and the mean loss gradient (without the L2 term) of every step.

    Args:
        sink: where they go; None on workers other than the first, whose gradients are the same.
    """

    def __init__(self, sink: Sink | None):
        self.sink = sink

    def on_epoch(self, run: Run) -> None:
        """Begin a new history with a new training."""
        if self.sink and not run.step:
            self.sink.cut([])

    def on_gradients(self, run: Run) -> None:
        """Hand the step over; it is written while training goes on."""
        if self.sink:
            gradients = [parameter.grad for parameter in run.model.parameters() if parameter.grad is not None]
            rate = run.optimizer.param_groups[0]["lr"]
            self.sink.append(rate, to_vector(run.model.parameters()).numpy(), to_vector(gradients).numpy())

    def on_epoch_end(self, run: Run) -> None:
        """Let the file catch up, so that the checkpoint finds it complete."""
        if self.sink:
            self.sink.flush()

    def results(self, run: Run) -> Results:
        """Seal the history with the final weights; its digest is a fact of the run."""
        if not self.sink:
            return Results()
        return Results(facts={"history": self.sink.seal(to_vector(run.model.parameters()).numpy())})

    def close(self) -> None:
        """Let go of the file."""
        if self.sink:
            self.sink.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the digests of what is written, [steps, 16]."""
        digests = b"".join(self.sink.digests) if self.sink else b""
        return {"digests": torch.tensor(bytearray(digests), dtype=torch.uint8).view(-1, 16)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind the checkpoint's last step."""
        if self.sink:
            self.sink.cut([digest.tobytes() for digest in state["digests"].numpy()])


@hook("deltagrad", source="arXiv:2006.14755")
def deltagrad(*, job: Job, worker: Worker, samples: Samples) -> Historian:
    """Record every step, so that samples can be deleted and added afterwards."""
    if worker.rank:
        return Historian(None)
    return Historian(Recording(version(job.storage, 0), layout(job.experiment, samples.data)))

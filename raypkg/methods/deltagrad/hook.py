"""Training that records every step's weights and gradient, and the checks that it can be replayed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment
from raypkg.data import Data
from raypkg.data.kinds import TEXTS
from raypkg.engine.hooks import Hook, Results, hook
from raypkg.engine.run import Run
from raypkg.engine.worker import Worker
from raypkg.experiments.samples import Samples, augmentations, new_model
from raypkg.experiments.training import Job

from .history import HistoryWriter, Layout, history_folder
from .objective import check_derivation, to_vector
from .settings import DeltaGradSettings


def check_replayable(settings: Experiment, data: Data) -> None:
    """Refuse data and models that DeltaGrad's derivation does not cover.

    Raises:
        UserError: texts, augmentation, dropout, or batch norm.
    """
    if data.train.kind is TEXTS:
        raise UserError(
            f"dataset {settings.dataset.name!r} holds texts: DeltaGrad takes images and rows, such as the features that"
            " `effray embed` makes of texts"
        )
    augment = augmentations(settings.dataset, data)
    if augment:
        raise UserError(
            f"dataset.augment = {','.join(augment)}: DeltaGrad replays exact gradients, so samples cannot be augmented"
        )
    check_derivation(new_model(settings, data), settings.model.name)


class Historian(Hook):
    """Records η, w_t and the mean loss gradient (without the L2 term) of every step.

    Args:
        writer: of the history; None on workers other than the first, whose gradients are the same.
    """

    priority = 100

    def __init__(self, writer: HistoryWriter | None):
        self.writer = writer

    def on_epoch(self, run: Run) -> None:
        """Begin a new history with a new training."""
        if self.writer and not run.step:
            self.writer.start()

    def on_gradients(self, run: Run) -> None:
        """Pass the step to the writer, which writes while training continues."""
        if self.writer:
            parameters = list(run.model.parameters())
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            rate = run.optimizer.param_groups[0]["lr"]
            self.writer.append(rate, to_vector(parameters), to_vector(gradients))

    def on_epoch_end(self, run: Run) -> None:
        """Wait for the writer, so that the checkpoint finds the file complete."""
        if self.writer:
            self.writer.flush()

    def results(self, run: Run) -> Results:
        """Seal the history with the final weights, and return its digest."""
        if not self.writer:
            return Results()
        return Results(facts={"history": self.writer.seal(to_vector(run.model.parameters()))})

    def close(self) -> None:
        """Close the file."""
        if self.writer:
            self.writer.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the digests of the written records, uint8 [steps, 16]."""
        digests = b"".join(self.writer.digests) if self.writer else b""
        return {"digests": torch.tensor(bytearray(digests), dtype=torch.uint8).view(-1, 16)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the checkpoint's last step."""
        if self.writer:
            self.writer.start([digest.tobytes() for digest in state["digests"].numpy()])


@hook("deltagrad", source="arXiv:2006.14755")
def deltagrad(*, job: Job, worker: Worker, samples: Samples) -> Historian:
    """Record every step, so that samples can be deleted and added afterwards."""
    if worker.rank:
        return Historian(None)
    settings = job.experiment
    if not isinstance(settings, DeltaGradSettings):
        raise UserError("hooks: deltagrad records the trainings of `effray deltagrad train` only")
    layout = Layout.of(new_model(settings, samples.data), settings.history.dtype)
    return Historian(HistoryWriter(history_folder(job.storage, 0), layout))

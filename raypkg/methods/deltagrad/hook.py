"""Training that records every step's weights and gradient, and the checks that it can be replayed."""

from collections.abc import Mapping
from typing import Any

import torch

from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment
from raypkg.data import Data
from raypkg.data.kinds import TEXTS
from raypkg.engine.run import Hook, Results, Run, hook
from raypkg.engine.worker import Worker
from raypkg.experiments.samples import Samples, augmentations, new_model
from raypkg.experiments.training import Job

from .history import HistoryWriter, Layout, history_folder
from .objective import check_derivation, to_vector
from .settings import DeltaGradSettings


def check_replayable(settings: Experiment, data: Data) -> None:
    """Refuse data and models that DeltaGrad's derivation does not cover: texts, augmentation, see the objective."""
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
    """Records η, w_t and the mean loss gradient (without the L2 term) of every step."""

    def __init__(self, writer: HistoryWriter):
        self.writer = writer

    def on_epoch(self, run: Run) -> None:
        """Begin a new history with a new training."""
        if not run.step:
            self.writer.start()

    def on_gradients(self, run: Run) -> None:
        """Pass the step to the writer, which writes while training continues."""
        parameters = list(run.model.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        rate = run.optimizer.param_groups[0]["lr"]
        self.writer.append(rate, to_vector(parameters), to_vector(gradients))

    def on_epoch_end(self, run: Run) -> None:
        """Wait for the writer, so that the checkpoint finds the file complete."""
        self.writer.flush()

    def results(self, run: Run) -> Results:
        """Seal the history with the final weights, and return its digest."""
        return Results(facts={"history": self.writer.seal(to_vector(run.model.parameters()))})

    def close(self) -> None:
        """Close the file."""
        self.writer.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the digests of the written records, uint8 [steps, 16]."""
        digests = bytearray(b"".join(self.writer.digests))
        return {"digests": torch.tensor(digests, dtype=torch.uint8).view(-1, 16)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the checkpoint's last step."""
        self.writer.start([digest.tobytes() for digest in state["digests"].numpy()])


@hook("deltagrad", source="arXiv:2006.14755")
def deltagrad(*, job: Job, worker: Worker, samples: Samples) -> Hook:
    """Record every step, so that samples can be deleted and added afterwards."""
    if worker.rank:  # gradients are the same on all workers
        return Hook()
    settings = job.experiment
    if not isinstance(settings, DeltaGradSettings):
        raise UserError("hooks: deltagrad records the trainings of `effray deltagrad train` only")
    layout = Layout.of(new_model(settings, samples.data), settings.history.dtype)
    return Historian(HistoryWriter(history_folder(job.storage, 0), layout))

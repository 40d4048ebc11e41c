"""What pre-training saw of the samples: the models' records joined, which joint epochs continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.coresets.recorder import Recorder
from raypkg.engine.hooks import Hook
from raypkg.engine.run import Run
from raypkg.experiments.coreset_files import save_record
from raypkg.experiments.training import Job
from raypkg.runs.checkpoints import load_state, save_state

from . import RESULT
from .member import Context, Trained
from .rounds import of_all_models

CONTINUED = f"{__name__}:continued_record"  # names the hook of joint epochs
SEEN = "checkpoints/seen.pt"


def keep_seen(context: Context, shards: Sequence[Tensor], trained: Sequence[Trained]) -> None:
    """Save what the models of all workers saw of their samples, each of its own shard.

    Args:
        context: of this worker.
        shards: of all models.
        trained: the models of this worker.
    """
    by_model = of_all_models(context, [each.seen for each in trained])
    if context.worker.rank > 0:
        return
    recorder = Recorder(context.samples.data.train.y)
    everything = recorder.state_dict()
    for shard, seen in zip(shards, by_model, strict=True):
        for name, values in seen.items():
            everything[name][shard] = values
    if context.settings.pretrain.joint_epochs:  # their record will be the one that stays
        save_state(context.storage, SEEN, everything)
    else:
        recorder.load_state_dict(everything)
        save_record(context.storage, RESULT, recorder.record)


class ContinuedRecord(Hook):
    """Has the recorder go on from what the models saw.

    Args:
        seen: the recorder's state.
    """

    priority = 0

    def __init__(self, seen: Mapping[str, Any]):
        self.seen = seen

    def on_start(self, run: Run) -> None:
        """Restore the state; a checkpoint of the joint epochs replaces it."""
        for recorder in run.hooks:
            if isinstance(recorder, Recorder):
                recorder.load_state_dict(self.seen)


def continued_record(*, job: Job) -> ContinuedRecord:
    """Return the hook of joint epochs.

    Raises:
        UserError: the file of what the models saw is damaged.
    """
    seen = load_state(job.storage, SEEN)
    if seen is None:
        raise UserError(f"{job.storage.root}/{SEEN} is damaged: run it again under another name")
    return ContinuedRecord(seen)

"""Ray Train, without what effray has no use for: each of its processes takes two seconds of a processor to start."""

import uuid
from typing import Any

from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from .capacity import Plan
from .session import has_dashboard
from .worker_loop import SharedDevices, work


def trainer(mailbox: Any, size: Plan, failures: int, folder: str) -> DataParallelTrainer:
    """Return the trainer of a group of workers that carries out what the mailbox brings.

    Args:
        mailbox: an actor.
        size: how many workers, and of which size.
        failures: how often they may be lost.
        folder: for Ray Train's own files.
    """
    config = {
        "mailbox": mailbox,
        "threads": size.cpus,
        "backend": "nccl" if size.gpus >= 1 else "gloo",  # NCCL refuses two workers on one GPU
    }
    return Trainer(
        work,
        train_loop_config=config,
        backend_config=SharedDevices(),
        scaling_config=ScalingConfig(
            num_workers=size.workers, use_gpu=size.gpus > 0, resources_per_worker=size.resources
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:8],
            storage_path=folder,
            failure_config=FailureConfig(max_failures=failures),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


class Trainer(DataParallelTrainer):
    """Starts no actor for Ray Data, and none that asks the dashboard about the group where there is no dashboard."""

    def _create_default_callbacks(self) -> list[Any]:
        unused: tuple[type, ...] = (DatasetsCallback,)
        if not has_dashboard():
            unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

"""Ray Train, without what effray has no use for: each of its processes takes two seconds of a processor to start."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from ray.train import FailureConfig, LoggingConfig, Result, RunConfig, ScalingConfig
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

if TYPE_CHECKING:  # Ray Train's controller imports this file, and waits for what it imports
    from .capacity import Plan


def trainer(mailbox: Any, size: Plan, failures: int, folder: str) -> DataParallelTrainer:
    """Return the trainer of a group of workers that carries out what the mailbox brings.

    Args:
        mailbox: an actor.
        size: how many workers, and of which size.
        failures: how often they may be lost.
        folder: for Ray Train's own files.
    """
    from .session import owns
    from .worker_loop import work

    config = {
        "mailbox": mailbox,
        "threads": size.cpus,
        "backend": "nccl" if size.gpus >= 1 else "gloo",  # NCCL refuses two workers on one GPU
    }
    kind = LocalTrainer if owns() else Trainer
    return kind(
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
    """Starts no actor for Ray Data."""

    unused: tuple[type, ...] = (DatasetsCallback,)

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, self.unused)]


class LocalTrainer(Trainer):
    """Starts no actor that would clean up after the driver, or ask for nodes: the cluster is the driver's own."""

    unused = (DatasetsCallback, PlacementGroupCleanerCallback)

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        arguments["scaling_policy"] = NoMoreNodes(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)


class NoMoreNodes(FixedScalingPolicy):
    """As many workers as were asked for, on the nodes that there are."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask nobody."""

    def _maybe_send_resource_request(self) -> None:
        pass


class SharedDevices(BackendConfig):
    """Lets a worker see the GPUs of the others on its node, so that they exchange gradients directly."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Return the class that Ray asks."""
        return _SharedDevices


class _SharedDevices(Backend):
    share_cuda_visible_devices = True

"""Running one function on every worker of a Ray Train group, with progress, restarts and errors in one line."""

import logging
import uuid
from collections.abc import Callable
from typing import Any

import torch

from raypkg.core.errors import Interruption, UserError, ending_told
from raypkg.core.settings import Cluster
from raypkg.engine.worker import Row, Worker, threads

from .capacity import Plan, plan
from .loss import watched
from .mailbox import first_error, open_mailbox
from .session import connect

PATIENCE = 7 * 24 * 3600  # seconds: LiPT's workers wait for each other's models; Ray notices the dead


def launch(
    function: Callable[..., Any],
    *arguments: Any,
    cluster: Cluster,
    report: Callable[[Row], None],
    folder: str,
    most: int | None = None,
) -> Any:
    """Return rank 0's value of ``function(worker, *arguments)``, run on all workers at once.

    A lost worker restarts the whole group: the function must resume from its own checkpoints. With
    ``cluster.workers = 0`` the function runs in this process and Ray is not started.

    Args:
        function: importable by the workers; returns plain Python values.
        arguments: picklable; the same for every worker.
        cluster: number and size of workers.
        report: receives, in this process, every row that a worker reports.
        folder: where Ray Train keeps its own files, reachable from every node.
        most: as many workers as there is work for.

    Raises:
        UserError: raised by the function, or the cluster is too small, or workers died too often.
    """
    if cluster.workers == 0:
        with threads(cluster.cpus_per_worker):
            return function(Worker(report=report), *arguments)
    connect(cluster)
    size = plan(cluster, most)
    with watched(), open_mailbox(report) as mailbox:
        config = {"function": function, "arguments": arguments, "mailbox": mailbox, "threads": size.cpus}
        return _fit(config, size, cluster.max_failures, folder)


def _fit(config: dict[str, Any], size: Plan, failures: int, folder: str) -> Any:
    """Run ``_worker_loop`` on a group of workers, and turn what went wrong there into one line."""
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    backend = "nccl" if size.gpus >= 1 else "gloo"  # NCCL refuses two workers on one GPU
    trainer = TorchTrainer(
        _worker_loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=size.workers, use_gpu=size.gpus > 0, resources_per_worker=size.resources
        ),
        torch_config=TorchConfig(backend=backend, timeout_s=PATIENCE),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:8],
            storage_path=folder,
            failure_config=FailureConfig(max_failures=failures),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )
    failure: Exception | None = None
    value = None
    try:
        with watched():  # within the mailbox's block as well, which must not wait for what is lost
            value = trainer.fit().return_value
    except (TrainingFailedError, RayActorError) as error:
        failure = error
    # What the user did wrong ends the workers as well, and says more than their end.
    if message := first_error(config["mailbox"]):
        raise UserError(message)
    if failure:
        raise Interruption(f"the workers were lost more than {failures} times: {_cause(failure)}") from failure
    return value


def _worker_loop(config: dict[str, Any]) -> Any:
    """Run the function on one Ray Train worker; what the user did wrong goes to the mailbox and is not retried."""
    import ray
    import ray.train
    from ray.train.torch import get_device

    mailbox = config["mailbox"]
    if ray.get(mailbox.error.remote()):
        return None
    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()

    def report(row: Row) -> None:
        mailbox.put.remote(dict(row))

    worker = Worker(context.get_world_rank(), context.get_world_size(), get_device(), report)
    try:
        with ending_told("the model, the data or a hook"):
            return config["function"](worker, *config["arguments"])
    except UserError as error:
        ray.get(mailbox.fail.remote(str(error)))
        raise


def _cause(error: Exception) -> str:
    """Return the last line of what the first worker that failed said."""
    logging.getLogger(__name__).debug("workers failed", exc_info=error)
    by_rank = getattr(error, "worker_failures", None)
    failures = list(by_rank.values()) if by_rank else [error]
    return str(failures[0]).strip().splitlines()[-1]

"""Running one function on every worker of a Ray Train group, with progress, restarts and errors in one line."""

import logging
import uuid
from collections.abc import Callable
from typing import Any

import torch

from raypkg.core.errors import UserError
from raypkg.core.settings import Cluster
from raypkg.engine.worker import Row, Worker, threads

from .mailbox import first_error, open_mailbox

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

    A lost worker restarts the whole group: the function must go on from its own checkpoints. With
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
    from .session import connect, plan

    connect(cluster)
    return _fit(function, arguments, plan(cluster, most), cluster.max_failures, report, folder)


def _fit(function: Any, arguments: Any, plan: Any, failures: int, report: Callable[[Row], None], folder: str) -> Any:
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    with open_mailbox(report) as mailbox:
        trainer = TorchTrainer(
            _worker_loop,
            train_loop_config={"function": function, "arguments": arguments, "mailbox": mailbox, "threads": plan.cpus},
            scaling_config=ScalingConfig(
                num_workers=plan.workers, use_gpu=plan.gpus > 0, resources_per_worker=plan.resources
            ),
            torch_config=TorchConfig(backend="nccl" if plan.gpus >= 1 else "gloo", timeout_s=PATIENCE),
            run_config=RunConfig(
                name=uuid.uuid4().hex[:8],
                storage_path=folder,
                failure_config=FailureConfig(max_failures=failures),
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )
        failure: Exception | None = None
        try:
            value = trainer.fit().return_value
        except (TrainingFailedError, RayActorError) as error:
            failure = error
        if message := first_error(mailbox):
            raise UserError(message)
        if failure:
            raise UserError(f"the workers were lost more than {failures} times: {_cause(failure)}") from failure
        return value


def _worker_loop(config: dict[str, Any]) -> Any:
    """Run the function on one Ray Train worker; what the user did wrong goes to the mailbox and is not retried."""
    import ray
    import ray.train
    from ray.train.torch import get_device

    mailbox, context = config["mailbox"], ray.train.get_context()
    if ray.get(mailbox.error.remote()):
        return None
    torch.set_num_threads(config["threads"])
    worker = Worker(
        context.get_world_rank(), context.get_world_size(), get_device(), lambda row: mailbox.put.remote(dict(row))
    )
    try:
        return config["function"](worker, *config["arguments"])
    except UserError as error:
        ray.get(mailbox.fail.remote(str(error)))
        raise


def _cause(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error}
    logging.getLogger(__name__).debug("workers failed", exc_info=error)
    return str(next(iter(failures.values()))).strip().splitlines()[-1]

"""The workers of a run: one group on Ray Train for all its phases, or this process. Imports no torch.

Tasks, rows, answers and user errors pass through a mailbox between the driver and the workers.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any

from raypkg.core.errors import ClusterLost, Interruption, UserError

from .session import Plan, cluster_errors, connect, disconnect, owns_cluster, plan

if TYPE_CHECKING:  # pydantic, which the mailbox's process does not need
    from raypkg.core.settings import Cluster

RESTARTS = 2  # attempts to start workers after the first has timed out, on a cluster without other users
LOST = "the process that relays metrics from the workers was lost"

Listener = Callable[[Mapping[str, Any]], None]  # receives rows of metrics


class Workers:
    """Run functions on all workers at once, one after another.

    Workers start at the first function and stay until the end. A lost worker restarts the whole group, which repeats
    the function that had not returned (worker_loop.py): each function must resume from its own checkpoints. With
    ``cluster.workers = 0`` functions run in this process, and Ray is not started: ``local`` is then their initial
    ``worker.local``, such as data that it has open. ``report`` receives every row of metrics in this process. Ray Train
    keeps its own files in ``folder``, reachable from every node.
    """

    def __init__(self, cluster: Cluster, report: Listener, folder: str, local: Mapping[str, Any] | None = None):
        self._cluster = cluster
        self._report = report
        self._folder = folder
        self._local = dict(local or {})
        self._most: int | None = None
        self._group: Group | None = None
        self._closing: threading.Thread | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.release()
        elif self._group and not isinstance(error, ClusterLost):  # a lost cluster answers no more
            self._group.abandon()
        if self._closing:
            self._closing.join()

    def limit(self, most: int) -> None:
        """Start at most this many workers where the settings leave their number open."""
        self._most = min(most, self._most or most)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return rank 0's value, plain Python, of ``function(worker, *arguments)``; workers import the function."""
        if self._cluster.workers == 0:
            from raypkg.engine.worker import Worker, threads

            with threads(self._cluster.cpus_without_gpu):
                return function(Worker(report=self._report, local=self._local), *arguments)
        if self._closing:  # an earlier group still holds CPUs
            self._closing.join()
        if self._group is None:
            connect(self._cluster)
        with cluster_errors():
            if self._group is None:
                size = plan(self._cluster, self._most)
                self._group = Group(size, self._cluster.max_failures, self._report, self._folder)
            return self._group.run(function, *arguments)

    def release(self) -> None:
        """End the workers, and a cluster that was started for them, while this process does what needs none."""
        if group := self._group:

            def close() -> None:
                with suppress(Exception):  # every answer is here: it does not matter how the workers end
                    group.close()
                disconnect()

            self._closing = threading.Thread(target=close, name="closing", daemon=True)
            self._closing.start()
            self._group = None


class Group:
    """Workers on Ray Train, which carry out the tasks in the mailbox; they may be lost ``failures`` times."""

    def __init__(self, size: Plan, failures: int, report: Listener, folder: str):
        self._failures = failures
        self._outcomes: SimpleQueue[Any] = SimpleQueue()  # an answer for every task, or an error to raise
        self._mailbox = open_mailbox()
        self._size = size
        self._folder = folder
        passing = (self._mailbox, report, self._outcomes)
        self._threads = [
            threading.Thread(target=self._fit, name="workers", daemon=True),
            threading.Thread(target=deliver, args=passing, name="mailbox", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return rank 0's value of ``function(worker, *arguments)``."""
        import ray

        task = ray.put((function, arguments))
        self._mailbox.assign.remote([task])
        outcome = self._outcomes.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        """End the workers and wait for that."""
        import ray

        self.abandon()
        for thread in self._threads:
            thread.join()
        ray.kill(self._mailbox)

    def abandon(self) -> None:
        """Send no more tasks to the workers, which may be busy; they end with this process at the latest."""
        self._mailbox.end.remote()

    def _fit(self) -> None:
        """Run Ray Train until the mailbox ends, and put what it raises among the outcomes."""
        from ray import train
        from ray.exceptions import RayActorError

        # Not TorchTrainer: its process group's store listens on every interface, and its controller imports torch.
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        from .worker_loop import SharedDevices, work

        size = self._size
        trainer = DataParallelTrainer(
            work,
            train_loop_config={
                "mailbox": self._mailbox,
                "threads": size.cpus,
                "backend": "nccl" if size.gpus >= 1 else "gloo",  # NCCL refuses two workers on one GPU
            },
            backend_config=SharedDevices(),
            scaling_config=train.ScalingConfig(
                num_workers=size.workers, use_gpu=size.gpus > 0, resources_per_worker=size.resources
            ),
            run_config=train.RunConfig(
                name=uuid.uuid4().hex[:8],
                storage_path=self._folder,
                # Ray Train leaks the CPUs of a worker that died while its group started, and would wait for them for
                # ever. On a cluster with other users, or one that is growing, waiting is right.
                failure_config=train.FailureConfig(
                    max_failures=self._failures, controller_failure_limit=RESTARTS if owns_cluster() else -1
                ),
                logging_config=train.LoggingConfig(log_level="CRITICAL"),
            ),
        )
        try:
            trainer.fit()
        except train.ControllerError as error:
            reason = str(error.controller_failure).partition(". ")[0]
            self._outcomes.put(Interruption(f"the workers cannot be started: {reason}"))
        except train.TrainingFailedError as error:
            logging.getLogger(__name__).debug("workers failed", exc_info=error)
            by_rank = getattr(error, "worker_failures", None)
            first = next(iter(by_rank.values())) if by_rank else error
            cause = str(first).strip().splitlines()[-1]
            self._outcomes.put(Interruption(f"the workers were lost more than {self._failures} times: {cause}"))
        except RayActorError:
            self._outcomes.put(Interruption("Ray Train's controller of the workers was lost"))
        except Exception as error:  # raised by the driver's own thread
            self._outcomes.put(error)


class Mailbox:
    """An actor that holds messages until they are read. Imports no torch, so it starts fast."""

    def __init__(self) -> None:
        self._tasks: list[Any] = []
        self._answered = 0  # tasks
        self._ended = False
        self._messages: list[tuple[str, Any]] = []  # kind and content
        self._changed = asyncio.Condition()

    async def assign(self, task: list[Any]) -> None:
        """Add the driver's next task: a reference inside a list, so that Ray does not resolve it here."""
        self._tasks.extend(task)
        await self._notify()

    async def end(self) -> None:
        """Send no more tasks to the workers."""
        self._ended = True
        await self._notify()

    async def next(self) -> int:
        """Return the number of the first unanswered task: restarted workers resume there."""
        return self._answered

    async def task(self, number: int) -> list[Any] | None:
        """Return the task of this number once it is assigned; None after the end."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._ended or number < len(self._tasks))
        return None if self._ended else self._tasks[number : number + 1]

    async def put(self, kind: str, content: Any) -> None:
        """Add a "row" of metrics, the "answer" to the first unanswered task, or a user's "error", which is the end."""
        self._answered += kind == "answer"
        self._ended |= kind == "error"
        self._messages.append((kind, content))
        await self._notify()

    async def collect(self) -> list[tuple[str, Any]]:
        """Return the messages since the last call once there are any; an empty list after the end."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._messages or self._ended)
        messages, self._messages = self._messages, []
        return messages

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def open_mailbox() -> Any:
    """Start a mailbox on the driver's own node, so that losing another node does not lose the run."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    on_this_node = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=on_this_node)(Mailbox).remote()


def deliver(mailbox: Any, report: Listener, outcomes: SimpleQueue[Any]) -> None:
    """Pass rows on to ``report``, answers and errors to ``outcomes``, until the last ones after the mailbox's end."""
    import ray
    from ray.exceptions import RayError

    try:
        while messages := ray.get(mailbox.collect.remote()):
            for kind, content in messages:
                if kind == "row":
                    report(content)
                else:
                    outcomes.put(UserError(content) if kind == "error" else content)
    except RayError:  # the mailbox died, or the whole cluster
        outcomes.put(Interruption(LOST))
    except Exception as error:  # such as a full disk: the driver raises it
        outcomes.put(error)

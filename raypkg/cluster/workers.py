"""The workers of a run: one group on Ray Train for all its phases, or this process. No torch at import."""

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from raypkg.core.errors import ClusterLost, Interruption
from raypkg.core.settings import Cluster

from .capacity import Plan, plan
from .loss import watched
from .mailbox import Delivery, open_mailbox
from .session import connect, disconnect

WAITING = "workers"  # the name of a thread that waits for the end of a group
TRAINER = f"{__package__}.trainer"
Listener = Callable[[Mapping[str, Any]], None]  # of rows of metrics


class Workers:
    """Run functions on all workers at once, one after another; workers start at the first and stay until the end.

    A lost worker restarts the whole group, which goes on with the function that had not returned: each must resume
    from its own checkpoints. With ``cluster.workers = 0`` functions run in this process, and Ray is not started.

    Args:
        cluster: number and size of workers.
        report: receives, in this process, every row that a worker reports.
        folder: where Ray Train keeps its own files, reachable from every node.
        actors: of one CPU each that are started beside the workers.
    """

    def __init__(self, cluster: Cluster, report: Listener, folder: str, actors: int = 0):
        self._cluster = cluster
        self._report = report
        self._folder = folder
        self._actors = actors
        self._most: int | None = None
        self._group: Group | None = None
        self._ending: threading.Thread | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.release()
        elif self._group and not isinstance(error, ClusterLost):  # otherwise nothing answers any more
            self._group.abandon()
        if self._ending:
            self._ending.join()

    def limit(self, most: int) -> None:
        """Start no more workers than there is work for, where the settings leave their number open."""
        self._most = min(most, self._most or most)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return rank 0's value of ``function(worker, *arguments)``.

        Args:
            function: importable by the workers; returns plain Python values.
            arguments: picklable; the same for every worker.

        Raises:
            UserError: raised by the function, or the cluster is too small, or workers died too often.
        """
        if self._cluster.workers == 0:
            from raypkg.engine.worker import Worker, threads

            with threads(self._cluster.cpus_without_gpu):
                return function(Worker(report=self._report), *arguments)
        if self._ending:  # of an earlier group
            self._ending.join()
        if self._group is None:
            threading.Thread(target=import_module, args=(TRAINER,), daemon=True).start()  # while Ray starts
            connect(self._cluster)
        with watched():
            if self._group is None:
                size = plan(self._cluster, self._most, self._actors)
                self._group = Group(size, self._cluster.max_failures, self._report, self._folder)
            return self._group.run(function, *arguments)

    def release(self) -> None:
        """End the workers, and a cluster that was started for them, while this process does what needs none."""
        if self._group:
            self._ending = threading.Thread(target=self._end, args=(self._group,), name="ending", daemon=True)
            self._ending.start()
            self._group = None

    def _end(self, group: "Group") -> None:
        with suppress(Exception):  # every answer is here: it does not matter how the workers end
            group.close()
        disconnect()


def are_abandoned() -> bool:
    """Say whether a thread still waits for workers, of which nothing is wanted."""
    return any(thread.name == WAITING for thread in threading.enumerate())


class Group:
    """Workers on Ray Train, which carry out what the mailbox brings them; a thread waits for their end.

    Args:
        size: how many, and of which size.
        failures: how often they may be lost.
        report: receives the rows of all workers.
        folder: for Ray Train's own files.
    """

    def __init__(self, size: Plan, failures: int, report: Listener, folder: str):
        self._failures = failures
        self._outcomes: SimpleQueue[Any] = SimpleQueue()  # an answer for every task, or an error to raise
        self._mailbox = open_mailbox()
        self._delivery = Delivery(self._mailbox, report, self._outcomes)
        self._size = size
        self._folder = folder
        self._thread = threading.Thread(target=self._fit, name=WAITING, daemon=True)
        self._thread.start()

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
        self._thread.join()
        self._delivery.join()
        ray.kill(self._mailbox)

    def abandon(self) -> None:
        """Have no more tasks for the workers, which may be busy; they end with this process if not before."""
        self._mailbox.end.remote()

    def _fit(self) -> None:
        from ray.exceptions import RayActorError
        from ray.train import TrainingFailedError

        try:
            trainer = import_module(TRAINER).trainer
            trainer(self._mailbox, self._size, self._failures, self._folder).fit()
        except TrainingFailedError as error:
            lost = f"the workers were lost more than {self._failures} times: {_cause(error)}"
            self._outcomes.put(Interruption(lost))
        except RayActorError:
            self._outcomes.put(Interruption("Ray Train's controller of the workers was lost"))
        except Exception as error:  # the driver's own thread raises it
            self._outcomes.put(error)


def _cause(error: Exception) -> str:
    """Return the last line of what the first worker that failed said."""
    logging.getLogger(__name__).debug("workers failed", exc_info=error)
    by_rank = getattr(error, "worker_failures", None)
    failures = list(by_rank.values()) if by_rank else [error]
    return str(failures[0]).strip().splitlines()[-1]

"""What workers send to the driver while they work: rows of metrics, and what the user did wrong."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from raypkg.core.errors import ClusterLost, Interruption

POLL = 0.25  # seconds between deliveries


class Mailbox:
    """An actor: rows on their way to the driver, and the first user error. Imports no torch, so it starts fast."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._error: str | None = None

    def put(self, row: dict[str, Any]) -> None:
        """Take a row from a worker."""
        self._rows.append(row)

    def drain(self) -> list[dict[str, Any]]:
        """Hand over all rows since the last call."""
        rows = self._rows
        self._rows = []
        return rows

    def fail(self, message: str) -> None:
        """Keep the first user error."""
        self._error = self._error or message

    def error(self) -> str | None:
        """Return the first user error, if there was one."""
        return self._error


@contextmanager
def open_mailbox(report: Callable[[Mapping[str, Any]], None]) -> Iterator[Any]:
    """Start a mailbox actor; a thread passes its rows to ``report`` until the block ends, the last ones included.

    It lives on the driver's own node: another could be lost, and with it a run whose driver is still there.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    on_this_node = NodeAffinitySchedulingStrategy(node, soft=False)
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=on_this_node)(Mailbox).remote()
    done = threading.Event()

    def deliver() -> None:
        last = False
        while not last:
            last = done.wait(POLL)  # rows that came until then are still delivered
            try:
                rows = ray.get(mailbox.drain.remote())
            except RayError:  # it or the cluster is gone: whoever waits for the workers will say so
                return
            for row in rows:
                report(row)

    thread = threading.Thread(target=deliver, name="mailbox", daemon=True)
    thread.start()
    try:
        yield mailbox
    except ClusterLost:  # nothing answers any more, so there is nothing to wait for
        raise
    except BaseException:
        _close(mailbox, done, thread)
        raise
    _close(mailbox, done, thread)


def _close(mailbox: Any, done: threading.Event, thread: threading.Thread) -> None:
    """Deliver the last rows and end the mailbox."""
    import ray

    done.set()
    thread.join()
    ray.kill(mailbox)


def first_error(mailbox: Any) -> str | None:
    """Return the first user error among the workers, or None when there was none.

    Raises:
        Interruption: the mailbox has died, and rows of metrics with it, which the checkpoints still have.
    """
    import ray
    from ray.exceptions import RayActorError

    try:
        return ray.get(mailbox.error.remote())
    except RayActorError:
        raise Interruption("the process that passes metrics on from the workers was lost") from None

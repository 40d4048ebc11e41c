"""Messages between the driver and the workers of a run: tasks one way; rows, answers and user errors the other."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any, NamedTuple

from raypkg.core.errors import Interruption, UserError

LOST = "the process that relays metrics from the workers was lost"


class Message(NamedTuple):
    """A message from a worker."""

    kind: str  # "row" of metrics, rank 0's "answer" to a task, or a user's "error"
    content: Any


class Mailbox:
    """An actor that holds messages until they are read. Imports no torch, so it starts fast."""

    def __init__(self) -> None:
        self._tasks: list[Any] = []
        self._answered = 0  # tasks
        self._ended = False
        self._messages: list[Message] = []
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

    async def put(self, row: dict[str, Any]) -> None:
        """Add a row of metrics from a worker."""
        self._messages.append(Message("row", row))
        await self._notify()

    async def answer(self, value: Any) -> None:
        """Add the answer to the first unanswered task."""
        self._answered += 1
        self._messages.append(Message("answer", value))
        await self._notify()

    async def fail(self, error: str) -> None:
        """Add a user's error, and end."""
        self._ended = True
        self._messages.append(Message("error", error))
        await self._notify()

    async def collect(self) -> list[Message]:
        """Return the messages since the last call once there are any; an empty list after the end."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._messages or self._ended)
        messages = self._messages
        self._messages = []
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


def start_delivery(
    mailbox: Any, report: Callable[[Mapping[str, Any]], None], outcomes: SimpleQueue[Any]
) -> threading.Thread:
    """Start a thread that delivers the workers' messages: rows to ``report``, answers and errors to ``outcomes``.

    It ends with the last messages after the mailbox has ended.
    """
    import ray
    from ray.exceptions import RayError

    def deliver() -> None:
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

    thread = threading.Thread(target=deliver, name="mailbox", daemon=True)
    thread.start()
    return thread

"""What passes between the driver and the workers of a run: tasks one way; rows, answers and user errors the other."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any, NamedTuple

from raypkg.core.errors import Interruption, UserError

LOST = "the process that passes metrics on from the workers was lost"


class Message(NamedTuple):
    """From a worker: a ``row`` of metrics, rank 0's ``answer`` to a task, or the ``error`` that the user made."""

    kind: str
    content: Any


class Mailbox:
    """An actor: keeps what is on its way. Imports no torch, so it starts fast."""

    def __init__(self) -> None:
        self._tasks: list[Any] = []
        self._answered = 0  # tasks
        self._ended = False
        self._messages: list[Message] = []
        self._changed = asyncio.Condition()

    async def assign(self, task: list[Any]) -> None:
        """Take the next task from the driver, a reference in a list, so that it is not opened here."""
        await self._change(lambda: self._tasks.extend(task))

    async def end(self) -> None:
        """Tell the workers that no more tasks will come."""
        await self._change(self._end)

    async def next(self) -> int:
        """Return the number of the first task without an answer: restarted workers go on there."""
        return self._answered

    async def task(self, number: int) -> list[Any] | None:
        """Return a task once there is one of this number; None when no more will come."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._ended or number < len(self._tasks))
        return None if self._ended else self._tasks[number : number + 1]

    async def put(self, row: dict[str, Any]) -> None:
        """Take a row from a worker."""
        await self._change(lambda: self._messages.append(Message("row", row)))

    async def answer(self, value: Any) -> None:
        """Take what the first task without an answer gave."""
        self._answered += 1
        await self._change(lambda: self._messages.append(Message("answer", value)))

    async def fail(self, error: str) -> None:
        """Take a user error, after which nothing is worth doing."""
        self._end()
        await self._change(lambda: self._messages.append(Message("error", error)))

    async def collect(self) -> list[Message]:
        """Hand over the messages since the last call, once there are any; none when no more will be asked for."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._messages or self._ended)
        messages = self._messages
        self._messages = []
        return messages

    def _end(self) -> None:
        self._ended = True

    async def _change(self, change: Callable[[], None]) -> None:
        async with self._changed:
            change()
            self._changed.notify_all()


def open_mailbox() -> Any:
    """Start a mailbox actor on the driver's own node: another could be lost, and with it a run whose driver lives."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    on_this_node = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=on_this_node)(Mailbox).remote()


class Delivery:
    """A thread that brings what the workers send: rows to ``report``, and to ``outcomes`` how each task went.

    Args:
        mailbox: the actor.
        report: takes the rows.
        outcomes: takes rank 0's answers, and errors of any kind, to be raised.
    """

    def __init__(self, mailbox: Any, report: Callable[[Mapping[str, Any]], None], outcomes: SimpleQueue[Any]):
        self._mailbox = mailbox
        self._report = report
        self._outcomes = outcomes
        self._thread = threading.Thread(target=self._deliver, name="mailbox", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the last messages, after the mailbox has ended."""
        self._thread.join()

    def _deliver(self) -> None:
        import ray
        from ray.exceptions import RayError

        try:
            while messages := ray.get(self._mailbox.collect.remote()):
                for kind, content in messages:
                    if kind == "row":
                        self._report(content)
                    else:
                        self._outcomes.put(UserError(content) if kind == "error" else content)
        except RayError:  # of the mailbox, or of the whole cluster, which whoever waits will say
            self._outcomes.put(Interruption(LOST))
        except Exception as error:  # such as a full disk: the driver raises it
            self._outcomes.put(error)

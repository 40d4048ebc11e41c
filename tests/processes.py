"""The processes of a command: found by their parents, told apart by their titles, killed."""

import os
import threading
import time
from contextlib import suppress

import psutil

LINGER = 90  # seconds: Ray's agents look for a dead cluster for 60


class Watch:
    """Notes every process that descends from another, until the block ends."""

    def __init__(self, pid: int):
        self._root = psutil.Process(pid)
        self._began = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.titles: dict[psutil.Process, str] = {}  # a later process of the same number is another
        self.times: dict[str, list[float]] = {}  # seconds at which processes of a title were seen

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def find(self, title: str) -> psutil.Process | None:
        """Return a living process of that title."""
        return next((seen for seen, name in [*self.titles.items()] if name == title and is_alive(seen)), None)

    def left(self) -> list[str]:
        """Return the titles of the processes that have not ended in time."""
        until = time.monotonic() + LINGER
        while (alive := [name for seen, name in self.titles.items() if is_alive(seen)]) and time.monotonic() < until:
            time.sleep(0.2)
        return alive

    def _look(self) -> None:
        while not self._done.wait(0.1):
            children: list[psutil.Process] = []
            with suppress(psutil.Error):
                children = self._root.children(recursive=True)
            for seen in children:
                title = title_of(seen) or self.titles.get(seen, "")  # one that is just ending has none
                self.titles[seen] = title
                self.times.setdefault(title, []).append(time.monotonic() - self._began)


def title_of(process: psutil.Process) -> str:
    """Return ``RayTrainWorker`` for an actor of that class, else the name of the script or the program."""
    words = []
    with suppress(psutil.Error):
        words = process.cmdline()
    if words and words[0].startswith("ray::"):
        return words[0].removeprefix("ray::").partition(".")[0]
    return os.path.basename(next((word for word in words if word.endswith(".py")), *words[:1])) if words else ""


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def listeners(process: psutil.Process) -> set[str]:
    """Return the addresses at which a process takes connections, as ``127.0.0.1:8265``."""
    with suppress(psutil.Error):
        taking = [each.laddr for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        return {f"{address.ip.removeprefix('::ffff:')}:{address.port}" for address in taking}
    return set()

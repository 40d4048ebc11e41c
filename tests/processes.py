"""The processes of a command: found by their parents, told apart by their titles, killed."""

import os
import signal
import threading
import time
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

LINGER = 90  # seconds: Ray's agents look for a dead cluster for 60


class Seen(NamedTuple):
    """A process, which a later one of the same number is not."""

    pid: int
    start: int  # in clock ticks since boot


class Watch:
    """Notes every process that descends from another, until the block ends."""

    def __init__(self, pid: int):
        self._pid = pid
        self._began = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.titles: dict[Seen, str] = {}
        self.times: dict[str, list[float]] = {}  # seconds at which processes of a title were seen

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def find(self, title: str) -> int | None:
        """Return the number of a living process of that title."""
        alive = (seen.pid for seen, name in [*self.titles.items()] if name == title and is_alive(seen))
        return next(alive, None)

    def left(self) -> list[str]:
        """Return the titles of the processes that have not ended in time."""
        until = time.monotonic() + LINGER
        while time.monotonic() < until:
            alive = [name for seen, name in self.titles.items() if is_alive(seen)]
            if not alive:
                return []
            time.sleep(0.2)
        return alive

    def _look(self) -> None:
        while not self._done.wait(0.1):
            for seen in descendants(self._pid):
                title = title_of(seen.pid) or self.titles.get(seen, "")  # one that is just ending has none
                self.titles[seen] = title
                self.times.setdefault(title, []).append(time.monotonic() - self._began)


def descendants(pid: int) -> list[Seen]:
    """Return the children of a process, theirs, and so on."""
    children: dict[int, list[Seen]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _fields(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(Seen(int(entry.name), int(fields[19])))
    found = []
    waiting = [pid]
    while waiting:
        near = children.get(waiting.pop(), [])
        found += near
        waiting += [child.pid for child in near]
    return found


def title_of(pid: int) -> str:
    """Return ``RayTrainWorker`` for an actor of that class, else the name of the script or the program."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        actor = words[0].removeprefix("ray::").partition(".")[0]
        if words[0].startswith("ray::"):
            return actor
        script = next((word for word in words if word.endswith(".py")), words[0])
        return os.path.basename(script)
    return ""


def is_alive(seen: Seen) -> bool:
    """Say whether a process still runs."""
    fields = _fields(seen.pid)
    return bool(fields) and fields[0] != "Z" and int(fields[19]) == seen.start


def kill(pid: int) -> None:
    """Kill a process, which may have ended already."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _fields(pid: int) -> list[str]:
    """Return what the kernel says of a process, from its state on."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return []


def listeners(pid: int) -> set[str]:
    """Return the addresses at which a process takes connections, as ``127.0.0.1:8265``."""
    sockets = set()
    with suppress(OSError):
        links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        sockets = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    return {address for inode, address in _listening() if inode in sockets}


def _listening() -> list[tuple[str, str]]:
    """Return inode and address of every socket of this machine that takes connections."""
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":  # listening
                found.append((words[9], _readable(words[1])))
    return found


def _readable(text: str) -> str:
    """Return an address that the kernel writes as little-endian words of hexadecimal digits."""
    host, port = text.split(":")
    words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
    address = ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return f"{mapped or address}:{int(port, 16)}"

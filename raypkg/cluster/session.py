"""The Ray cluster: one that is running, or one of this process's own that only this machine reaches; its capacity."""

from __future__ import annotations

import _thread
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from raypkg.core.errors import ClusterLost, UserError

if TYPE_CHECKING:
    from raypkg.core.settings import Cluster

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the default of 2 s delays the end of every phase by as much
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise each line that a worker prints appears twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process fewer
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune is silent only with its old output engine
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # otherwise Ray's core prints its own account of a lost cluster to the terminal
    "RAY_prestart_worker_first_driver": "0",  # most of these processes would never be used
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run folders hold everything
}
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray listens on 127.0.0.1 only, as it does on those systems
ANSWER = 5  # seconds within which a cluster must answer
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # HTTP/2's, with empty settings
SETTINGS = 4  # type of the frame with which every HTTP/2 server answers
WITHOUT = "--cluster.workers 0 trains in this process, without Ray"
MOST_WORKERS = 8  # by default; cluster.workers may ask for more
_own_node = ""  # Ray's id of this machine in the cluster that this process started last


def prepare(address: str | None = None) -> None:
    """Set the environment variables that Ray reads when it is imported; the user's own values stay.

    Where no cluster is named (``address``) or running, the one that this process will start is confined to the loopback
    interface.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address not in (None, "local") or running_cluster() is not None or os.environ.get(LOOPBACK) == "0":
        return
    os.environ[LOOPBACK] = "0"
    if "ray" in sys.modules and not sys.modules["ray"].is_initialized():
        problem = "Ray was imported before effray: a cluster that effray starts now listens on every interface"
        log.warning("%s; set %s=0 before importing Ray", problem, LOOPBACK)


def connect(settings: Cluster, *, dashboard: bool = False) -> None:
    """Join the cluster at the address, in RAY_ADDRESS or from `ray start`; otherwise start one on this machine.

    A cluster of this process's own listens on the loopback interface only and requires Ray's token, unless
    RAY_AUTH_MODE says otherwise. Clusters of other effray processes are never joined: they end with their process. Ray
    Train within Ray Tune needs the ``dashboard`` of such a cluster to free the CPUs of stopped trials.
    """
    prepare(settings.address)
    import ray

    if ray.is_initialized():
        return
    global _own_node
    address = _address(settings)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    token = Path.home() / ".ray" / "auth_token"
    is_first = not token.exists()
    try:
        if address is None:
            options["include_dashboard"] = dashboard
            loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))  # lo; on macOS lo0
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)  # where training workers listen to each other
        with _silenced():
            ray.init(address=address or "local", **options)
    except Exception as error:  # any of Ray's processes failed; or another version, a wrong token, no raylet
        problem = f"cannot join the Ray cluster at {address}" if address else "Ray cannot start on this machine"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{problem}: {reason}; {WITHOUT}") from error
    if address is None:
        _own_node = ray.get_runtime_context().get_node_id()
        if is_first and token.exists():
            token.chmod(0o600)  # Ray leaves it readable for every user of the machine
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":  # Ray sets it where it finds or makes a token
        risk = "anyone who reaches its ports can run code as you"
        log.warning("this Ray cluster requires no token: %s; RAY_AUTH_MODE=token protects it", risk)


def disconnect() -> None:
    """Shut down the cluster that this process started, if any."""
    if owns_cluster():
        import ray

        ray.shutdown()


def is_apart(settings: Cluster) -> bool:
    """Return True if no cluster is named, joined or running, and this machine has no GPU for workers."""
    import torch

    joined = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    return not (settings.address or running_cluster() or joined or torch.cuda.is_available())


def owns_cluster() -> bool:
    """Return True if effray has started the cluster in this process, which then has no other users.

    A caller may have shut that one down and started another since.
    """
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized() and ray.get_runtime_context().get_node_id() == _own_node)


@contextmanager
def cluster_errors() -> Iterator[None]:
    """Turn the death of the raylet or the GCS into ``ClusterLost``.

    Ray ends this whole process with code 1 some seconds after its raylet died, without a word. So the raylet of a
    cluster of this process's own, which is a child process, is watched, and its death interrupts the block.
    """
    from ray.exceptions import LocalRayletDiedError, NodeDiedError, RaySystemError, RpcError

    left = threading.Event()
    raylet = None  # always so beyond Linux
    for thread in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # the thread has just ended
            raylet = next(filter(_is_raylet, map(int, thread.read_text().split())), raylet)

    def watch(raylet: int) -> None:
        while not left.wait(0.2):
            if not _is_raylet(raylet):
                _thread.interrupt_main(signal.SIGTERM)
                return

    if raylet is not None:
        threading.Thread(target=watch, args=[raylet], name="raylet", daemon=True).start()
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        is_dead = raylet is not None and not _is_raylet(raylet)
        if is_dead or isinstance(error, LocalRayletDiedError | NodeDiedError | RaySystemError | RpcError):
            raise ClusterLost("the Ray cluster was lost: its raylet on this machine died") from error
        raise
    finally:
        left.set()


def _is_raylet(process: int) -> bool:
    """Return True if a process is a living raylet; a zombie has died."""
    try:
        _, name, state = Path(f"/proc/{process}/stat").read_text().replace(")", "(").split("(", 2)
    except (OSError, ValueError):
        return False
    return name == "raylet" and state.split()[0] != "Z"


def running_cluster() -> str | None:
    """Return the address in RAY_ADDRESS, or that of the last `ray start`, which Ray documents to keep in this file."""
    if address := os.environ.get("RAY_ADDRESS"):
        return None if address == "local" else address
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    try:
        return file.read_text().strip() or None
    except OSError:
        return None


def _address(settings: Cluster) -> str | None:
    """Return host and port of the cluster to join, or None to start one."""
    named = settings.address or os.environ.get("RAY_ADDRESS")
    if named and named.startswith("ray://"):
        raise UserError(f"cluster.address = {named!r} is Ray Client's, which cannot train: give the head's HOST:6379")
    address = running_cluster() if named == "auto" else named or running_cluster()
    if address in (None, "local"):
        return None
    try:
        _check_answers(address)
    except (OSError, ValueError) as error:
        if not named:  # the cluster of `ray start` died without `ray stop`
            log.warning("the Ray cluster started at %s no longer answers: starting another", address)
            return None
        raise UserError(f"no Ray cluster answers at cluster.address = {named!r} ({error}); {WITHOUT}") from None
    return address


def _check_answers(address: str) -> None:
    """Raise ``OSError`` for an address at which nothing speaks gRPC: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), ANSWER) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return  # without a certificate there is no answer
        connection.sendall(PREFACE)
        head = connection.recv(9)  # of a frame: length, type, flags and stream
    if len(head) < 4 or head[3] != SETTINGS:
        raise OSError("something else listens there; a head's port is 6379 unless `ray start` was given another")


@contextmanager
def _silenced() -> Iterator[None]:
    """Discard what Ray's threads print to stderr, and restore the signal handlers, of which Ray's print a stack."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sys.stderr.flush()
    terminal = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        if threading.current_thread() is threading.main_thread():  # Python allows it only there
            for number, handler in handlers.items():
                signal.signal(number, handler)


# Capacity: the size of a run's workers and of a study's trials


class Plan(NamedTuple):
    """Number and size of workers: the settings, completed by what the cluster has."""

    workers: int
    cpus: int
    gpus: float
    at_once: int = 1  # trials of a study that run side by side, each with such workers

    @property
    def of_a_trial(self) -> int:
        """The setting ``cluster.workers`` of a trial: 0 if its own process is the only one; others need Ray Train."""
        return self.workers if self.workers > 1 or self.gpus else 0

    @property
    def resources(self) -> dict[str, float]:
        """Ray resources of one worker."""
        request: dict[str, float] = {"CPU": self.cpus}
        if self.gpus:
            request["GPU"] = self.gpus
        return request


def plan(settings: Cluster, most: int | None = None) -> Plan:
    """Complete the number (at most ``most``, if unset) and size of workers by what the cluster has.

    A GPU trains on more samples a second than a CPU decodes: workers with GPUs divide all CPUs of a node among them.
    More than the cluster has is refused: Ray would wait forever.
    """
    nodes = _nodes()
    all_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    gpus = settings.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if all_gpus else 0.0
    bound = min(MOST_WORKERS, most or MOST_WORKERS)
    cpus = settings.cpus_without_gpu
    if gpus and settings.cpus_per_worker is None:
        # A worker's share of its node's CPUs, on the node with the fewest per GPU.
        with_gpus = [node for node in nodes if node.get("GPU", 0.0) >= gpus]
        shares = [node.get("CPU", 0.0) / (node["GPU"] // gpus) for node in with_gpus]
        cpus = max(1, int(min(shares, default=1.0)))
    fit = room(cpus, gpus)
    workers = settings.workers or max(1, min(fit, bound))
    if workers > fit:
        all_cpus = sum(node.get("CPU", 0.0) for node in nodes)
        there = f"{all_cpus:g} CPU and {all_gpus:g} GPU on {len(nodes)} nodes, room for {fit}"
        advice = "lower cluster.workers, cluster.cpus_per_worker or cluster.gpus_per_worker"
        size = f"{cpus} CPU and {gpus:g} GPU"
        raise UserError(f"{workers} workers of {size} do not fit the cluster, which has {there}: {advice}")
    return Plan(workers, cpus, gpus)


def trial_size(cluster: Cluster, concurrent: int | None) -> Plan:
    """Return the workers of a trial, by default one, and how many trials run at once, by default as many as fit."""
    alone = {"gpus_per_worker": 0} if cluster.workers == 0 else {}
    workers = plan(cluster.model_copy(update={"workers": cluster.workers or 1, **alone}))
    fit = room(workers.cpus, workers.gpus) // workers.workers
    if concurrent and concurrent > fit:
        trials = f"{fit} trials of {workers.workers} processes"
        raise UserError(f"--concurrent {concurrent}: the cluster has room for {trials}")
    return workers._replace(at_once=concurrent or fit)


def room(cpus: int, gpus: float) -> int:
    """Return the number of workers of that size that fit the cluster: a worker is never split over two nodes."""
    fit = 0
    for node in _nodes():
        by_cpu = node.get("CPU", 0.0) // cpus
        by_gpu = node.get("GPU", 0.0) // gpus if gpus else by_cpu
        fit += int(min(by_cpu, by_gpu))
    return fit


def _nodes() -> list[Mapping[str, float]]:
    """Return the resources of every living node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]

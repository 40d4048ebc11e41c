"""Ray's environment, and the connection to a cluster."""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from raypkg.core.errors import UserError
from raypkg.core.settings import Cluster

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the default of 2 s delays the end of every phase by as much
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise each line that a worker prints appears twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process fewer
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune is silent only with its old output engine
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",  # processes of which most are never used: the group's have their own
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run folders have it all
}
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray listens on 127.0.0.1 alone, as it does on those systems
ANSWER = 5  # seconds within which a cluster must answer
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # HTTP/2's, and empty settings
SETTINGS = 4  # the type of the frame with which every HTTP/2 server answers
_owns = False  # whether this process has started the cluster
WITHOUT = "--cluster.workers 0 trains in this process, without Ray"


def prepare() -> None:
    """Set the environment that Ray is to find when it is imported; what the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect(settings: Cluster, *, dashboard: bool = False) -> None:
    """Join the cluster at the address, in RAY_ADDRESS or from ``ray start``; otherwise start one on this machine.

    A cluster that is started listens on the loopback interface alone and asks for Ray's token, unless RAY_AUTH_MODE
    says otherwise. One that another effray process started for itself is left alone: it ends with that process.

    Args:
        settings: where a cluster may be.
        dashboard: whether one that is started has Ray's dashboard, ten processes, which Ray Train within Ray Tune asks
            whether a trial that was stopped still holds its CPUs. Without it, Ray's core is all that is started.

    Raises:
        UserError: an address was given and no cluster answers there, or Ray cannot start.
    """
    prepare()
    import ray

    if ray.is_initialized():
        return
    address = _address(settings)
    if address is None:
        _start(dashboard)
    else:
        _join(address)
    _warn_of_open_doors()


def disconnect() -> None:
    """End the cluster, if it is one that this process has started."""
    global _owns
    if _owns:
        import ray

        ray.shutdown()
        _owns = False


def owns() -> bool:
    """Say whether this process has started the cluster."""
    return _owns


def _address(settings: Cluster) -> str | None:
    """Return host and port of the cluster to join, or None to start one."""
    from ray._private.services import canonicalize_bootstrap_address

    asked = settings.address or os.environ.get("RAY_ADDRESS")
    if asked and asked.startswith("ray://"):
        raise UserError(f"cluster.address = {asked!r} is Ray Client's, which cannot train: give the head's HOST:6379")
    address = asked
    try:
        address = canonicalize_bootstrap_address(asked)
        if address:
            _check_answers(address)
    except (OSError, ValueError) as error:
        if not asked:  # a cluster of `ray start` that has died without `ray stop`
            log.warning("the Ray cluster that was started at %s no longer answers: starting another", address)
            return None
        raise UserError(f"no Ray cluster answers at cluster.address = {asked!r} ({error}); {WITHOUT}") from None
    return address


def _check_answers(address: str) -> None:
    """Refuse an address at which nothing speaks gRPC: Ray itself would try for minutes.

    Raises:
        OSError: nothing answers, or something else.
    """
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), ANSWER) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return  # it answers to nobody without a certificate
        connection.sendall(PREFACE)
        head = connection.recv(9)  # of a frame: length, type, flags and stream
    if len(head) < 4 or head[3] != SETTINGS:
        raise OSError("something else listens there; a head's port is 6379 unless `ray start` was given another")


def _start(dashboard: bool) -> None:
    """Start a cluster on this machine that only this machine can reach."""
    import ray
    from ray._private import ray_constants

    os.environ[LOOPBACK] = "0"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())  # where training workers listen to each other
    ray_constants.ENABLE_RAY_CLUSTER = False  # Ray may have been imported before the variable was set
    token = Path.home() / ".ray" / "auth_token"
    is_first = not token.exists()
    try:
        with _silenced(), nullcontext() if dashboard else _core():
            ray.init(address="local", include_dashboard=dashboard, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # whatever keeps one of its processes from starting
        raise UserError(f"Ray cannot start on this machine: {_first_line(error)}; {WITHOUT}") from error
    global _owns
    _owns = True
    if is_first and token.exists():
        token.chmod(0o600)  # Ray leaves it readable for every user of the machine


def _loopback() -> str:
    """Return the name of the loopback interface: lo, on macOS lo0."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _join(address: str) -> None:
    import ray

    try:
        with _silenced():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # another version, a wrong token, or a node without a raylet
        raise UserError(f"cannot join the Ray cluster at {address}: {_first_line(error)}; {WITHOUT}") from error


@contextmanager
def _core() -> Iterator[None]:
    """Have Ray start what runs tasks, its GCS and raylet, and nothing that serves a person who looks at the cluster.

    Ray starts the process of its dashboard, and waits for it, when told to have none; its agents import the dashboard's
    packages wherever they are installed, and the raylet waits for that as well.
    """
    from ray._private import services, utils
    from ray._private.node import Node

    unwanted: list[tuple[Any, str, Callable[..., Any]]] = [
        (services, "start_api_server", lambda *_, **__: ("", None)),  # the dashboard: no address, no process
        (utils, "get_dashboard_dependency_error", lambda: ImportError("nobody asked for a dashboard")),
        (Node, "start_log_monitor", lambda _: None),  # copies what workers print to the driver
        (Node, "start_monitor", lambda _: None),  # the autoscaler: this machine is all there is
    ]
    kept = [getattr(place, name) for place, name, _ in unwanted]
    for place, name, nothing in unwanted:
        setattr(place, name, nothing)
    try:
        yield
    finally:
        for (place, name, _), start in zip(unwanted, kept, strict=True):
            setattr(place, name, start)


@contextmanager
def _silenced() -> Iterator[None]:
    """Discard what is printed as errors, by Ray's own threads too, while what matters is raised.

    Handlers of signals are put back: Ray's own would dump its stack at SIGTERM and abort.
    """
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
        if threading.current_thread() is threading.main_thread():  # there alone may handlers be set
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _warn_of_open_doors() -> None:
    """Say so when the cluster takes code from whoever reaches it."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":  # Ray sets it where it finds a token, or makes one
        log.warning(
            "this Ray cluster asks for no token: whoever reaches its ports runs code as you; RAY_AUTH_MODE=token"
            " protects it"
        )

"""How a lost cluster is noticed, before Ray ends the process for it."""

import _thread
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from raypkg.core.errors import ClusterLost


@contextmanager
def watched() -> Iterator[None]:
    """Tell in one line that the cluster was lost, whichever of Ray's many errors that leads to.

    The block is left as soon as this node's raylet dies: seconds later Ray ends the whole process without a word.

    Raises:
        ClusterLost: the raylet is dead.
    """
    try:
        with _interrupted_by_its_death():
            yield
    except (Exception, KeyboardInterrupt) as error:
        if _is_lost():
            raise ClusterLost("the Ray cluster was lost: its raylet on this machine died") from error
        raise


@contextmanager
def _interrupted_by_its_death() -> Iterator[None]:
    """Send this process a SIGTERM, to be handled as any other, when this node's raylet dies within the block."""
    connection = _raylet()
    if connection is None:  # there is none, or it is dead already
        yield
        return
    left = threading.Event()

    def wait() -> None:
        connection.recv(1)  # the raylet says nothing: this returns when one side closes the connection
        if not left.is_set():
            _thread.interrupt_main(signal.SIGTERM)

    thread = threading.Thread(target=wait, name="raylet", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        connection.shutdown(socket.SHUT_RDWR)
        thread.join()
        connection.close()


def _is_lost() -> bool:
    from ray._private.worker import _global_node

    if _global_node is None:  # no cluster was joined, so none was lost
        return False
    connection = _raylet()
    if connection is None:
        return True
    connection.close()
    return False


def _raylet() -> socket.socket | None:
    """Return a connection to this node's raylet, or None where there is none."""
    from ray._private.worker import _global_node

    if _global_node is None:
        return None
    connection = socket.socket(socket.AF_UNIX)
    if connection.connect_ex(_global_node.raylet_socket_name) == 0:
        return connection
    connection.close()
    return None

"""How a command ends: asked to, as by Ctrl-C, in order and with a word on how to go on; by itself, at once."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)  # what asks for an orderly end: a machine that is taken away, a lost terminal


@contextmanager
def orderly_end() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does; those that are ignored, as under nohup, stay so."""
    if threading.current_thread() is not threading.main_thread():  # there alone may handlers be set
        yield
        return
    ours = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is _interrupt:  # one that came is ignored to the end of the process
                signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # asked again, the end that is under way goes on
    raise KeyboardInterrupt


class SwiftEnd:
    """Ends the process without taking it apart, once its code is known and everybody else's last act is done.

    Python would free every object of PyTorch's and Ray's, one to two seconds for nothing. Callbacks at exit run last
    in, first out: whoever makes this first, before Ray is imported, comes after all others.

    Attributes:
        code: to exit with; None until the command has ended as it should, and Python ends the process itself.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        atexit.register(self.now)

    def now(self) -> None:
        """End the process; what nobody has written by now is not written."""
        if self.code is None:
            return
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.code)

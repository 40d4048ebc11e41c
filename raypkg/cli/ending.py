"""How a command ends that is asked to: as by Ctrl-C, in order and with a word on how to go on."""

import signal
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

"""The command line: ``effray EXPERIMENT`` for every experiment, and the commands around them."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


def script(arguments: Sequence[str] | None = None) -> None:
    """Run the command line as the last act of a process: the console script, and the jobs."""
    try:
        main(arguments)
    except SystemExit as ended:
        # Ray's shutdown at exit waits for a lost cluster, or meets threads that still wait for workers, and then ends
        # the process with code 1. Its processes end with this one in any case.
        if ended.code and "ray" in sys.modules:
            sys.stdout.flush()
            os._exit(int(ended.code))
        raise


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; a user's mistake is one line and exit code 2."""
    import click

    from raypkg.core.errors import UserError

    from .commands import effray

    logging.basicConfig(format="effray: %(message)s")
    try:
        try:
            with _signals_interrupt():
                code = effray.main(arguments, prog_name="effray", standalone_mode=False)
        except click.exceptions.NoArgsIsHelpError as error:  # a group without its command
            print(error.ctx.get_help())
            code = 0
        sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        _fail(str(error), 2)
    except click.ClickException as error:
        _fail(str(UserError(error.format_message())), error.exit_code)
    except click.Abort:
        _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _fail(message: str, code: int) -> None:
    print(f"effray: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP interrupt a command as Ctrl-C does: a machine is taken away, a terminal is closed.

    Ignored signals, as under nohup, stay ignored. Only the main thread may set handlers.
    """
    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is _interrupt:  # after its first arrival a signal stays ignored
                signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second signal must not disturb the orderly end
    raise KeyboardInterrupt

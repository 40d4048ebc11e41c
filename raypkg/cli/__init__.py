"""The command line: ``effray EXPERIMENT`` for every experiment, and the commands around them."""

import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Output(io.FileIO):
    """A standard stream, which outlives its reader, as `head`, and its disk: then writes go nowhere."""

    lost = 0  # number of the error that ended it; 0 = none

    def write(self, data: Any) -> int:
        """Write bytes."""
        try:
            return super().write(data) or 0
        except OSError as error:
            self.lost = error.errno or errno.EIO
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def script(arguments: Sequence[str] | None = None) -> None:
    """Run the command line as the last act of a process: the console script, and the jobs.

    A run is finished and kept even if its output is closed or cannot be written.
    """
    while (unused := os.open(os.devnull, os.O_RDWR)) <= 2:  # a closed one would be taken by the next file
        pass
    os.close(unused)
    output, errors = (Output(number, "w", closefd=False) for number in (1, 2))
    if sys.stderr is sys.__stderr__:
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(errors), errors="backslashreplace", line_buffering=True)
    if sys.stdout is sys.__stdout__:  # None if closed; otherwise a caller in this process reads it
        encoding = getattr(sys.stdout, "encoding", None)  # "replace": no run is lost for a letter that it lacks
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(output), encoding, "replace", line_buffering=output.isatty())
    try:
        main(arguments)
    except SystemExit as ended:
        sys.stdout.flush()
        if output.lost not in (0, errno.EPIPE) and not ended.code:
            print(f"effray: cannot write the output: {os.strerror(output.lost)}", file=sys.stderr)
            ended.code = 1
        # Ray's shutdown at exit waits for a lost cluster, or meets threads that still wait for workers, and then ends
        # the process with code 1. Its processes end with this one in any case.
        if ended.code and "ray" in sys.modules:
            os._exit(int(ended.code))
        raise


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; a user's mistake is one line and exit code 2."""
    import click

    from raypkg.core.errors import UserError, printable, redacted, user_code

    from .commands import effray

    class Printable(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return printable(redacted(super().format(record)))

    log = logging.StreamHandler()
    log.setFormatter(Printable("effray: %(message)s"))
    logging.basicConfig(handlers=[log])
    try:
        try:
            os.getcwd()
        except FileNotFoundError:
            raise UserError("the working folder has been deleted: change to another one") from None
        try:
            with _signals_interrupt(), user_code():
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

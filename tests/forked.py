"""Commands in processes of their own that have everything imported already: a fork takes milliseconds, not seconds."""

import gc
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

DEATH = 86  # exit code of a process that died on purpose


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line that a refused command says."""
        assert self.code == 2, self
        assert self.err.startswith("effray: ") and self.err.count("\n") == 1 and self.err.endswith("\n"), self.err
        assert "Traceback" not in self.out
        return self.err


class Process:
    """A forked process that runs a function in a folder; what it returns, if anything, is the exit code."""

    def __init__(self, function: Callable[[], object], folder: Path):
        self._files = [folder.parent / f"{folder.name}-{os.getpid()}-{id(self)}.{name}" for name in ("out", "err")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the threads that this process may have
            gc.freeze()  # else the child's collections copy what it shares with us, page by page
            self.pid = os.fork()
        if not self.pid:
            os._exit(self._run(function, folder))

    def _run(self, function: Callable[[], object], folder: Path) -> int:
        code: object = 1
        try:
            for descriptor, file in enumerate(self._files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            sys.stdin = open(os.devnull)
            sys.stdout = open(1, "w", closefd=False)
            sys.stderr = open(2, "w", closefd=False)
            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            code = function()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        return int(code or 0)

    @property
    def said(self) -> str:
        """What it has written to its standard output so far."""
        return self._files[0].read_text() if self._files[0].exists() else ""

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self) -> Ended:
        """Wait for its end."""
        _, status = os.waitpid(self.pid, 0)
        out, err = (file.read_text() for file in self._files)
        for file in self._files:
            file.unlink()
        return Ended(os.waitstatus_to_exitcode(status), out, err)


def warm_up() -> None:
    """Import what commands import, so that every process begins with it."""
    import matplotlib.figure  # noqa: F401
    import pyarrow.dataset  # noqa: F401
    import torch._dynamo  # noqa: F401

    import raypkg.cli.execute
    import raypkg.experiments.selection  # noqa: F401
    from raypkg.coresets.rules import coreset
    from raypkg.data.sources import dataset
    from raypkg.engine.run import hook
    from raypkg.experiments import experiment
    from raypkg.models import model

    for registry in (coreset, dataset, hook, experiment, model):
        assert registry.entries


def start(line: str, folder: Path, before: Callable[[], object] = lambda: None) -> Process:
    """Start a command as typed without the program's name, after a call of ``before`` in its process."""
    from raypkg.cli import main

    warm_up()

    def run() -> None:
        before()
        main(shlex.split(line))

    return Process(run, folder)


def effray(line: str, folder: Path, before: Callable[[], object] = lambda: None) -> Ended:
    """Run a command as typed to its end."""
    return start(line, folder, before).end()


def kill_at(owner: object, name: str, due: Callable[[list], bool]) -> None:
    """Let the process be killed at a call of a function, if that is due after all calls so far."""
    honest, calls = getattr(owner, name), []

    def call(*arguments, **named):
        calls.append(arguments)
        if due(calls):
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*arguments, **named)

    setattr(owner, name, call)

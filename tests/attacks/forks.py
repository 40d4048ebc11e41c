"""A process that has imported everything, and forks for each command: a process of its own without the seconds.

Run as a script it reads orders from its input, a line of JSON each, and answers each with the command's exit code.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

LIMIT = 20  # seconds that a refusal may take
MEMORY = 2 << 30  # bytes that a command may add to what is imported


class Result(NamedTuple):
    code: int  # negative: the signal that killed it
    out: str
    err: str


class Forks:
    """Commands, each in a process of its own that begins with everything imported."""

    def __init__(self, server: subprocess.Popen[str], folder: Path):
        self._server = server
        self._out = folder / "out.txt"
        self._err = folder / "err.txt"

    def __call__(
        self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, limit: int = LIMIT
    ) -> Result:
        """Run ``effray ARGUMENTS`` in a folder; one that takes longer than the limit is killed by SIGALRM."""
        order = {
            "arguments": list(arguments),
            "folder": str(folder),
            "environment": dict(environment or {}),
            "limit": limit,
            "out": str(self._out),
            "err": str(self._err),
        }
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return Result(code, self._out.read_text(errors="replace"), self._err.read_text(errors="replace"))


@contextmanager
def forks(folder: Path, environment: Mapping[str, str]) -> Iterator[Forks]:
    """Start the process that forks, and end it with the last command."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, __file__], env={**os.environ, **environment}, **pipes) as server:
        yield Forks(server, folder)
        server.stdin.close()


def run_fresh(arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Result:
    """Run ``effray ARGUMENTS`` in a new process, which imports everything anew."""
    command = [sys.executable, "-m", "raypkg", *arguments]
    variables = {**os.environ, **environment}
    ended = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=LIMIT)
    return Result(ended.returncode, ended.stdout, ended.stderr)


def _import_everything() -> None:
    """Import what commands import: ``methods`` looks at every registry."""
    from raypkg.cluster.session import prepare

    prepare()
    import ray.tune  # noqa: F401
    import torchvision.datasets  # noqa: F401
    import wandb  # noqa: F401

    import raypkg.cli.execute
    import raypkg.methods.deltagrad.answer
    import raypkg.methods.deltagrad.verify
    import raypkg.methods.sparse.export
    import raypkg.runs.compare
    import raypkg.runs.plots
    import raypkg.sweeps.sweep  # noqa: F401
    from raypkg.cli import main

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), suppress(SystemExit):
        main(["methods"])


def _next_order() -> dict[str, Any] | None:
    """Return an order in a process that is to carry it out, or None in the one that forks, at the end of its input."""
    for line in sys.stdin:
        process = os.fork()
        if not process:
            return json.loads(line)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def _become(order: Mapping[str, Any]) -> None:
    """Make this process one that a user has started."""
    os.setsid()
    os.chdir(order["folder"])
    os.environ.update(order["environment"])
    for stream, file in ((0, os.devnull), (1, order["out"]), (2, order["err"])):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdin = open(0)
    sys.argv = ["effray", *order["arguments"]]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.alarm(order["limit"])


def _carry_out(arguments: Sequence[str]) -> int:
    """Run a command and what an interpreter runs at its end, but for taking the imported modules apart."""
    from raypkg.cli import main

    code = 0
    try:
        main(arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    _import_everything()
    order = _next_order()
    if order:
        _become(order)
        code = _carry_out(order["arguments"])
        os._exit(code)

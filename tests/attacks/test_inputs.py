"""Bad input, by the hundred: one line that names what is wrong, exit code 2, and everything else as it was.

The cases are tables in ``inputs_*.py``: what is attacked, a command, what is wrong, and the facts of its line.
"""

import logging
import os
import resource
import shlex
import shutil
import signal
import sys
from fnmatch import fnmatch
from functools import partial
from hashlib import blake2b
from pathlib import Path

import pytest

from attacks import inputs_code, inputs_commands, inputs_data, inputs_runs
from attacks.cases import Case, Cases
from attacks.worlds import make_world
from forked import effray

TABLES = (inputs_commands, inputs_data, inputs_runs, inputs_code)
CASES = [case for table in TABLES for group in vars(table).values() if isinstance(group, Cases) for case in group]
READ = ("cache", "cache/*.lock", "cache/*.arrow")  # data sets that are read before what is wrong is found
NOWHERE = "127.0.0.1:1"
LIMIT = 20  # seconds that a refusal may take
LONGEST = 600  # characters of a refusal, however long what is wrong
MEMORY = 2 << 30  # bytes that a command may add to what is imported


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Import what some commands need, which would take each of them seconds."""
    from raypkg.cluster.session import prepare

    prepare()
    import ray.tune  # noqa: F401
    import torchvision.datasets  # noqa: F401
    import wandb  # noqa: F401

    import raypkg.experiments.coreset_files
    import raypkg.methods.deltagrad.answer
    import raypkg.methods.sparse.export
    import raypkg.runs.plots
    import raypkg.studies.start  # noqa: F401


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def folder(world, tmp_path) -> Path:
    """The folder of a user who has worked for a while, as it was."""
    return shutil.copytree(world, tmp_path / "w", symlinks=True)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_one_line_and_nothing_else(case, folder):
    case.prepare(folder)
    before = contents(folder)
    line = effray(shlex.join(case.words), folder, partial(begin, case, folder)).line
    assert len(line) < LONGEST and "interrupted" not in line
    assert case.is_said(line), f"{case.says!r} is not said: {line}"
    after = contents(folder)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    allowed = (*READ, *case.leaves)
    assert [name for name in sorted(changed) if not any(fnmatch(name, pattern) for pattern in allowed)] == []


def begin(case: Case, folder: Path) -> None:
    """Make a fork a process that a user has started, with a limit of time and one of memory."""
    os.setsid()
    os.environ.update(EFFRAY_CACHE=f"{folder}/cache", HOME=str(folder), MPLCONFIGDIR=f"{folder.parent}/matplotlib")
    os.environ.update({"RAY_ADDRESS": NOWHERE, **case.environment})  # whatever is not refused starts no Ray
    sys.dont_write_bytecode = True
    logging.getLogger().handlers.clear()  # pytest's, which would keep what belongs on the terminal
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.alarm(LIMIT)


def contents(folder: Path) -> dict[str, str]:
    """Return a digest of every file below a folder, and the kind of what is no file."""

    def content(path: Path) -> str:
        if path.is_symlink():
            return f"link to {path.readlink()}"
        return blake2b(path.read_bytes()).hexdigest() if path.is_file() else "folder"

    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*")}

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
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from hashlib import blake2b
from pathlib import Path

import pytest

from attacks import inputs_code, inputs_commands, inputs_data, inputs_runs
from attacks.cases import Case, Cases, is_said
from attacks.worlds import make_world
from forked import Ended, effray

TABLES = (inputs_commands, inputs_data, inputs_runs, inputs_code)
CASES = [case for table in TABLES for group in vars(table).values() if isinstance(group, Cases) for case in group]
READ = ("cache", "cache/*.lock", "cache/*.arrow")  # data sets that are read before what is wrong is found
NOWHERE = "127.0.0.1:1"
LIMIT = 20  # seconds that a refusal may take
LONGEST = 600  # characters of a refusal, however long what is wrong
MEMORY = 2 << 30  # bytes that a command may add to what is imported

Contents = Mapping[str, str]


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
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture(scope="module")
def original(world) -> Contents:
    return contents(world)


@pytest.fixture(scope="module")
def place(tmp_path_factory, world) -> Path:
    folder = tmp_path_factory.mktemp("place") / "w"
    shutil.copytree(world, folder, symlinks=True)
    return folder


@pytest.fixture
def folder(place, world, original) -> Iterator[Path]:
    """The folder of a user who has worked for a while, as it was."""
    yield place
    restore(place, world, original)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_one_line_and_nothing_else(case, folder):
    case.prepare(folder)
    before = contents(folder)
    line = ended(case, folder).line
    assert len(line) < LONGEST and "interrupted" not in line
    assert is_said(case.says, line), f"{case.says!r} is not said: {line}"
    changed = differing(before, contents(folder))
    assert [name for name in changed if not is_allowed(name, case.leaves)] == []


def ended(case: Case, folder: Path) -> Ended:
    """Run the command of a case."""
    environment = {
        "EFFRAY_CACHE": f"{folder}/cache",
        "HOME": str(folder),
        "MPLCONFIGDIR": f"{folder.parent}/matplotlib",
        "RAY_ADDRESS": NOWHERE,  # whatever is not refused starts no Ray
        **case.environment,
    }
    return effray(shlex.join(case.words), folder, begin(environment))


def begin(environment: Mapping[str, str]) -> Callable[[], None]:
    """Return what makes a fork a process that a user has started, with a limit of time and one of memory."""

    def beginning() -> None:
        os.setsid()
        os.environ.update(environment)
        sys.dont_write_bytecode = True
        logging.getLogger().handlers.clear()  # pytest's, which would keep what belongs on the terminal
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        signal.alarm(LIMIT)

    return beginning


def contents(folder: Path) -> Contents:
    """Return a digest of every file below a folder, and the kind of what is no file."""
    return {str(path.relative_to(folder)): _content(path) for path in folder.rglob("*")}


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    return blake2b(path.read_bytes()).hexdigest() if path.is_file() else "folder"


def differing(one: Contents, other: Contents) -> list[str]:
    """Return the names of what is in one alone, or differs."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def is_allowed(name: str, patterns: tuple[str, ...]) -> bool:
    """Return True if a case may leave a file or folder of this name."""
    return any(fnmatch(name, pattern) for pattern in (*READ, *patterns))


def restore(folder: Path, world: Path, whole: Contents) -> None:
    """Make a folder what the world is, whose contents are given."""
    names = differing(whole, contents(folder))
    for name in reversed(names):  # what is in a folder before the folder
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    for name in names:
        if whole.get(name) == "folder":
            (folder / name).mkdir()
        elif name in whole:
            shutil.copy2(world / name, folder / name)

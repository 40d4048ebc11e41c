"""Bad input, by the hundred: one line that names what is wrong, exit code 2, and everything else as it was.

The cases are tables in ``inputs_*.py``: what is attacked, a command, and what is wrong with what the line must say.
"""

import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from hashlib import blake2b
from pathlib import Path

import pytest

from attacks import inputs_code, inputs_command_line, inputs_data, inputs_runs
from attacks.cases import Cases, is_said
from attacks.forks import Forks, forks, run_fresh
from attacks.worlds import make_world

TABLES = (inputs_command_line, inputs_data, inputs_runs, inputs_code)
CASES = [case for table in TABLES for group in vars(table).values() if isinstance(group, Cases) for case in group]
READ = ("cache", "cache/*.lock", "cache/*.arrow")  # data sets that are read before what is wrong is found
NOWHERE = "127.0.0.1:1"

Contents = Mapping[str, str]


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Iterator[Forks]:
    folder = tmp_path_factory.mktemp("forks")
    environment = {
        "MPLCONFIGDIR": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "RAY_ADDRESS": NOWHERE,  # whatever is not refused starts no Ray
    }
    with forks(folder, environment) as run:
        yield run


@pytest.fixture(scope="session")
def world(tmp_path_factory, run) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, run)
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory, world) -> Path:
    folder = tmp_path_factory.mktemp("place") / "w"
    shutil.copytree(world, folder, symlinks=True)
    return folder


@pytest.fixture
def folder(place, world) -> Iterator[Path]:
    """The folder of a user who has worked for a while, as it was."""
    yield place
    restore(place, world)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_one_line_and_nothing_else(case, run, folder):
    case.prepare(folder)
    before = contents(folder)
    environment = {"EFFRAY_CACHE": f"{folder}/cache", "HOME": str(folder), **case.environment}
    result = (run_fresh if case.fresh else run)(case.words, folder, environment)
    assert result.err.startswith("effray: ") and result.err.count("\n") == 1 and result.err.endswith("\n"), result.err
    assert is_said(case.says, result.err), f"{case.says!r} is not said: {result.err}"
    assert result.code == 2
    assert "Traceback" not in result.out
    changed = differing(before, contents(folder))
    assert [name for name in changed if not is_allowed(name, case.leaves)] == []


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
    """Say whether a case may leave a file or folder of this name."""
    return any(fnmatch(name, pattern) for pattern in (*READ, *patterns))


def restore(folder: Path, original: Path) -> None:
    """Make a folder what the original is."""
    whole = contents(original)
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
            shutil.copy2(original / name, folder / name)

"""Bad input, by the hundred: one line that names what is wrong, exit code 2, and everything else as it was."""

import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from hashlib import blake2b
from pathlib import Path

import pytest

from attacks import inputs_code, inputs_command_line, inputs_data, inputs_runs
from attacks.cases import Case, Cases, is_said
from attacks.forks import Forks, forks
from attacks.worlds import make_world

TABLES = (inputs_command_line, inputs_data, inputs_runs, inputs_code)
CASES = [case for table in TABLES for group in vars(table).values() if isinstance(group, Cases) for case in group]
FINE = ("cache", "cache/*.lock", "cache/*.arrow")  # a data set that was read before what is wrong was found


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Iterator[Forks]:
    folder = tmp_path_factory.mktemp("forks")
    environment = {
        "MPLCONFIGDIR": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": "default",
    }
    with forks(folder, environment) as run:
        yield run


@pytest.fixture(scope="session")
def world(tmp_path_factory, run) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, run)
    return folder


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_one_line_and_nothing_else(case, run, world, tmp_path):
    folder = tmp_path / "w"
    shutil.copytree(world, folder, symlinks=True)
    case.prepare(folder)
    before = contents(folder)
    result = run(case.words, folder, {"EFFRAY_CACHE": f"{folder}/cache", "HOME": str(tmp_path), **case.environment})
    assert result.err.startswith("effray: ") and result.err.count("\n") == 1 and result.err.endswith("\n"), result.err
    assert is_said(case.says, result.err), result.err
    assert result.code == 2
    assert "Traceback" not in result.out
    assert changes(before, contents(folder), case) == []


def contents(folder: Path) -> dict[str, str]:
    """Return a digest of every file below a folder, and the kind of what is no file."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = blake2b(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


def changes(before: dict[str, str], after: dict[str, str], case: Case) -> list[str]:
    """Return what is new, gone or other than before, apart from what the case allows."""
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    allowed = (*FINE, *case.leaves)
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in allowed)]

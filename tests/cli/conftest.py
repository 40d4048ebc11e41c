"""The command line as a user has it, called in this process from an empty working folder, without Ray."""

import shlex
import shutil
from contextlib import chdir
from functools import cache
from typing import NamedTuple

import pytest

from raypkg.cli import main

WITH_WORKERS = ("lipt", "train", "crest", "sparse", "select")


class Result(NamedTuple):
    code: int
    out: str
    err: str


def arguments_of(line: str) -> list[str]:
    """Return the arguments of a command as typed after ``effray``, without workers unless it names some."""
    words = shlex.split(line)
    has_workers = words[:1] in [[name] for name in WITH_WORKERS] or words[:2] == ["deltagrad", "train"]
    if has_workers and not {"--help", "--cluster.workers"} & {*words}:
        words += ["--cluster.workers", "0"]
    return words


@pytest.fixture
def call(tmp_path, monkeypatch, capsys, blank_pictures):
    """Return a function that takes a command as typed, and gives back its exit code and output."""
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> Result:
        arguments = arguments_of(line.removeprefix("effray "))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        return Result(ended.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def effray(call):
    """Return a function that runs a command which succeeds, and gives back what it printed."""

    def effray(arguments: str) -> str:
        result = call(f"effray {arguments}")
        assert (result.code, result.err) == (0, "")
        return result.out

    return effray


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory, blank_pictures):
    """Return a function that gives the folder in which a command was carried out, once for all tests of a file."""

    @cache
    def carried_out(arguments: str):
        folder = tmp_path_factory.mktemp("carried-out")
        with chdir(folder), pytest.raises(SystemExit) as ended:
            main(arguments_of(arguments))
        assert not ended.value.code
        return folder

    return carried_out


@pytest.fixture
def after(call, carried_out, tmp_path):
    """Return a function that puts into the working folder what a command leaves there, for tests that begin after it.

    Each test has a copy of its own.
    """

    def after(arguments: str) -> None:
        shutil.copytree(carried_out(arguments) / "runs", tmp_path / "runs", dirs_exist_ok=True)

    return after


@pytest.fixture
def refusal(call, tmp_path):
    """Return a function that runs a command which must fail in one line, and gives back that line."""

    def refusal(arguments: str, *, leaves: int = 0) -> str:
        before = list(tmp_path.glob("runs/*/*"))
        result = call(f"effray {arguments}")
        assert result.code == 2
        assert result.err.startswith("effray: ") and result.err.count("\n") == 1 and result.err.endswith("\n")
        assert "Traceback" not in result.out
        assert len(list(tmp_path.glob("runs/*/*"))) == len(before) + leaves
        return result.err

    return refusal

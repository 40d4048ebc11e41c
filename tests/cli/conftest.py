"""The command line as a user has it, called in this process from an empty working folder, without Ray."""

import shlex
from typing import NamedTuple

import pytest

from raypkg.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Return a function that takes a command as typed, and gives back its exit code and output."""
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> Result:
        words = shlex.split(line)
        trains = words[1] in ("lipt", "train", "crest", "sparse") or words[1:3] == ["deltagrad", "train"]
        if trains and "--help" not in words:
            words += ["--cluster.workers", "0"]
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(words[1:])
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

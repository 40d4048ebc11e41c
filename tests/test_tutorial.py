"""The tutorial, as a reader of it runs it: every cell of its notebook in order, commands by a shell."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ray_runs import effray

NOTEBOOK = Path(__file__).parents[1] / "raypkg/cli/tutorial/tutorial.ipynb"
CELLS = ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
COMMANDS = [line[1:] for cell in CELLS for line in cell.replace("\\\n", "").splitlines() if line.startswith("!")]
SHELL = f'set -e; effray() {{ {shlex.quote(sys.executable)} -m raypkg "$@"; }}\n'


def run(cell, names):
    """Run a cell as Jupyter does, except that a command which fails ends the notebook."""
    if cell.startswith("!"):
        done = subprocess.run(
            ["bash", "-c", SHELL + "\n".join(line.removeprefix("!") for line in cell.splitlines())],
            env={**os.environ, "EFFRAY_RUNS": "runs"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{cell}\n{done.stdout}{done.stderr}"
        return done.stdout
    return exec(compile(cell, "cell", "exec"), names)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Copy the tutorial and work there."""
    monkeypatch.chdir(tmp_path)
    effray("tutorial", "mine")
    monkeypatch.chdir("mine")
    return tmp_path / "mine"


def test_the_folder_is_complete_and_is_never_overwritten(folder, monkeypatch, capsys):
    assert len([*folder.glob("digits/*/*.png")]) == 1437 and len([*folder.glob("new/*.png")]) == 10
    assert len((folder / "questions.tsv").read_text().splitlines()) == 61
    assert [each.name for each in folder.parent.iterdir()] == ["mine"]  # no temporary folder is left
    monkeypatch.chdir(folder.parent)
    for place, words in {"mine": "mine exists", "none/here": "cannot write none/here: No such file"}.items():
        effray("tutorial", place, code=2)
        assert words in capsys.readouterr().err


def test_the_notebook_is_stored_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert cells[0]["cell_type"] == "markdown" and len(CELLS) > 10


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("effray")])
def test_its_commands_are_understood(command, monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent)
    effray(*shlex.split(command)[1:], "--help")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # only Jupyter reads the picture
def test_every_cell_runs(folder):
    names = {"__name__": "__main__"}
    printed = "".join(run(cell, names) or "" for cell in CELLS)
    for sign in ("10: 0, 1, 2", "new/7.png │ 7", "McNemar", "verdict at", "\\begin{tabular}", "report.html", "number"):
        assert sign in printed, sign
    assert "craig" in names["study"]["row"].to_pylist()

"""Requests whose disk fills or breaks, or whose process dies or is stopped, at any write; and damage to every file.

Whatever happens, the log has each request once, and model, history and all else are those of the undisturbed run.
"""

import io
import json
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disk import ALL, Disk, death, full, read_only
from forked import DEATH, Ended
from forked import effray as forked
from raypkg import load_model
from raypkg.cli import main
from raypkg.core.errors import UserError
from raypkg.runs.storage import Storage

RUN = Path("runs/deltagrad/a")
TRAIN = "train --name {} --dataset table:rows.csv --train.epochs 2 --train.batch_size 20 --cluster.workers 0"
QUEUE = ({"delete": [1, 2], "id": "x"}, {"add": "table:rows.csv", "id": "y"}, {"restore": [2], "id": 3})
LINES = {
    "delete": "delete a --ids 1,2 --period 2",
    "add": "add a --data table:rows.csv",
    "stream": "stream a queue.jsonl --together 1",
    "together": "stream a queue.jsonl",
}
EVERY_LINE = pytest.mark.parametrize("line", LINES.values(), ids=LINES)
PASSING = {"time", "seconds", "digest", "previous"}  # facts of an entry that no two answers share
WRITES = ("mkdir", "open", "write", "sync", "rename")
CHANGES = (*WRITES, "delete")
STEPS = ("mkdir", "write", "rename", "delete")  # after which the disk holds something else
EVERY = os.environ.get("EFFRAY_EVERY_OPERATION")  # and not one of four, of three replays one of nine
FEWEST = 20  # operations of a request, lest nothing be attacked


def run(line):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(line.split())
    return Ended(ended.value.code or 0, out.getvalue(), err.getvalue())


def effray(line):
    return run(f"deltagrad {line}")


def attacked(line, act, at, kinds=CHANGES, onwards=False):
    """Return how a command ends, in a process of its own, if something happens in place of an operation on the run."""
    disk = Disk(RUN.absolute(), act, at, kinds, onwards)
    return forked(f"deltagrad {line}", Path.cwd(), disk.install)


def moments(line):
    """Return the operations at which a command is attacked, without end."""
    return count(1, 1 if EVERY else 9 if line == LINES["stream"] else 4)


# The run


class Place:
    """A folder with a recorded run that is attacked again and again."""

    def __init__(self, template):
        self._template = template
        self.renew()

    def renew(self):
        shutil.rmtree("runs", ignore_errors=True)
        shutil.copytree(self._template / "runs", "runs")

    @property
    def entries(self):
        return [json.loads(line) for line in (RUN / "log.jsonl").read_text().splitlines()]

    @property
    def state(self):
        """What every file of the run holds, of the log what is not of its time."""
        files = {str(path): path.read_bytes() if path.is_file() else None for path in RUN.rglob("*")}
        entries = [{name: value for name, value in entry.items() if name not in PASSING} for entry in self.entries]
        return {**files, str(RUN / "log.jsonl"): entries}

    def undisturbed(self, line):
        self.renew()
        assert effray(line).code == 0
        state = self.state
        self.renew()
        return state

    def finish(self, line):
        """Open the run, and ask again for what has not been answered."""
        assert effray("log a").code == 0
        if line.startswith("stream") or len(self.entries) == 1:
            assert effray(line).code == 0


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Return a folder with two short runs, their data and a queue."""
    folder = tmp_path_factory.mktemp("recorded")
    x = np.random.default_rng(0).normal(size=(60, 2))
    rows = "".join(f"{a:.3f},{b:.3f},{'pq'[i % 2]}\n" for i, (a, b) in enumerate(x))
    (folder / "rows.csv").write_text(f"a,b,label\n{rows}")
    (folder / "queue.jsonl").write_text("\n".join(map(json.dumps, QUEUE)))
    here = os.getcwd()
    os.chdir(folder)
    for name, options in {"a": "", "other": " --seed 1"}.items():
        assert effray(TRAIN.format(name) + options).code == 0
        shutil.rmtree(folder / f"runs/deltagrad/{name}/plots")
    os.chdir(here)
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rows.csv", "queue.jsonl"):
        shutil.copy(template / name, name)
    return Place(template)


def attacks(place, line, act, kinds, onwards=False):
    """Yield how a command ends when attacked at each moment; afterwards it is finished, and its result compared."""
    expected = place.undisturbed(line)
    for number in moments(line):
        place.renew()
        ended = attacked(line, act, number, kinds, onwards)
        if ended.code == 0:
            break
        yield number, ended
        place.finish(line)
        assert place.state == expected, number
    assert number > FEWEST


# Deaths


@EVERY_LINE
def test_killed_at_any_write_a_request_is_answered_once(place, line):
    for _, ended in attacks(place, line, death, STEPS):
        assert ended.code == DEATH


@EVERY_LINE
def test_interrupted_at_any_write_a_request_leaves_nothing_of_itself(place, line):
    def interrupt():
        raise KeyboardInterrupt

    before = place.state
    for number, ended in attacks(place, line, interrupt, STEPS):
        answered = len(place.entries) > 1
        if line.startswith("stream"):
            assert ended.line == "effray: interrupted; the same command answers the rest\n"
        elif answered:
            assert ended.line == "effray: interrupted, but the request is answered\n"
        else:
            assert ended.line == "effray: interrupted; the run is as it was, and the same command starts again\n"
        assert answered or place.state == before, number


@pytest.mark.parametrize("in_place", [False, True], ids=["before the model", "after the model"])
def test_killed_after_its_entry_a_deletion_is_in_force_for_every_reader(place, in_place, monkeypatch):
    def death_after_the_entry():
        if len(place.entries) == 2 and is_unsettled(place) != in_place:
            death()

    assert attacked(LINES["delete"], death_after_the_entry, 1, STEPS, onwards=True).code == DEATH
    assert is_unsettled(place) != in_place
    options = "--dataset table:rows.csv --model linear --train.epochs 1 --cluster.workers 0"
    for reader in (
        f"train --name b --train.from a {options}",
        f"train --name c --train.from {RUN}/model.safetensors {options}",
        "select --name d --model-from a --rule el2n --dataset table:rows.csv --dataset.scale unit --cluster.workers 0",
        "deltagrad train --resume a",
    ):
        ended = run(reader)
        assert ended.code == (0 if in_place else 2), ended.err
        assert in_place or f"`effray deltagrad log {RUN.absolute()}` completes an interrupted request" in ended.line
    if not in_place:
        with pytest.raises(UserError, match="is not the model of the last entry"):
            load_model("a")
        assert effray(f"log {RUN.absolute()}").code == 0
    served = load_model("a").head.weight.detach()
    place.undisturbed(LINES["delete"])
    assert effray(LINES["delete"]).code == 0
    assert torch.equal(served, load_model("a").head.weight)


# Disks


def test_whatever_an_entry_names_is_on_the_disk_before_it(place):
    log = Path("operations").absolute()
    assert (
        forked(f"deltagrad {LINES['add']}", Path.cwd(), Disk(RUN.absolute(), at=0, kinds=ALL, log=log).install).code
        == 0
    )
    operations = [line.split() for line in log.read_text().splitlines()]
    renamed = [(number, path) for number, (kind, path) in enumerate(operations) if kind == "rename"]
    files = {path.partition(".")[0] for _, path in renamed}
    assert {"added/00001", "requests/00001", "versions/00001/model", "log"} <= files
    for number, path in renamed:
        assert ["sync", path] in operations[:number], path
        if not path.startswith("log."):
            entry = next(number for number, path in renamed if path.startswith("log."))
            assert number > entry or ["sync", os.path.dirname(path)] in operations[number:entry]


@EVERY_LINE
def test_a_disk_that_is_full_from_any_write_on(place, line):
    before = place.state
    for number, ended in attacks(place, line, full, WRITES, onwards=True):
        message = ended.line
        assert "cannot write" in message and ("No space left" in message or "the disk is full" in message)
        entries = len(place.entries)
        assert entries > 1 or place.state == before, number
        holds = "the request is in force all the same" in message
        assert is_unsettled(place) <= holds <= (entries > 1), message


def is_unsettled(place):
    """Whether the model is not that of the last entry."""
    return place.entries[-1]["model"] != Storage(str(RUN)).digest("model.safetensors")


@EVERY_LINE
def test_a_disk_that_breaks_at_any_write_or_deletion(place, line):
    for _, ended in attacks(place, line, read_only, STEPS, onwards=True):
        assert ended.line


@pytest.mark.parametrize("line", ["log a", "verify a"])
def test_a_read_only_run_can_be_looked_at(place, line):
    assert effray(LINES["delete"]).code == 0
    before = place.state
    assert attacked(line, read_only, 1, onwards=True).code == 0
    assert place.state == before


def test_leftovers_on_a_read_only_disk_are_named(place):
    (RUN / "versions/00007").mkdir()
    message = attacked("log a", read_only, 1, onwards=True).line
    assert "cannot delete" in message and "versions/00007': Read-only file system" in message


# Damage


class Damage(NamedTuple):
    """What happens to a file."""

    kind: str
    position: int
    bits: int

    def befall(self, path, other):
        content = bytearray(path.read_bytes())
        position = self.position % max(1, len(content))
        path.unlink()
        if self.kind == "folder":
            path.mkdir()
        elif self.kind == "foreign":
            shutil.copy(other, path)
        elif self.kind == "empty":
            path.touch()
        elif self.kind == "cut":
            path.write_bytes(content[:position])
        elif self.kind == "gap":
            path.write_bytes(content[:position] + content[position + self.bits :])
        elif self.kind == "flip":
            content[position] ^= self.bits
            path.write_bytes(content)


KINDS = ("flip", "flip", "flip", "gap", "cut", "missing", "empty", "folder", "foreign")
DAMAGES = st.builds(Damage, st.sampled_from(KINDS), st.integers(0, 100_000), st.integers(1, 255))
FILES = (
    "config.toml", "log.jsonl", "rows.parquet", "model.safetensors", "requests/00001.parquet", "requests/00002.parquet",
    "added/00002.arrow", "versions/00002/history.arrow", "versions/00002/history.digests",
    "versions/00002/model.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def answered(template, tmp_path_factory):
    """Return a folder with two runs that have answered the same two requests."""
    root = tmp_path_factory.mktemp("answered") / "runs"
    shutil.copytree(template / "runs", root)
    for run in ("a", "other"):
        assert effray(f"delete {run} --ids 1,2 --root {root}").code == 0
        assert effray(f"add {run} --data table:{template}/rows.csv --root {root}").code == 0
    return root


@settings(derandomize=True, deadline=None, max_examples=150)
@given(name=st.sampled_from(FILES), damage=DAMAGES)
def test_a_damaged_file_is_named_or_the_result_is_right(answered, name, damage):
    damaged = answered.parent / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(answered, damaged)
    sound = effray(f"log a --root {damaged}")
    damage.befall(damaged / "deltagrad/a" / name, damaged / "deltagrad/other" / name)
    ended = effray(f"log a --root {damaged}")
    assert ended == sound or Path(name).name in ended.line

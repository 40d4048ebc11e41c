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
    ended = run(f"deltagrad {line}")
    assert ended.code == 0, ended


def attacked(line, act, at, kinds=CHANGES, onwards=False, **options):
    """Return how a command ends, in a process of its own, if something happens in place of an operation on the run."""
    disk = Disk(RUN.absolute(), act, at, kinds, onwards, **options)
    return forked(f"deltagrad {line}", Path.cwd(), disk.install)


# The run


def entries():
    return [json.loads(line) for line in (RUN / "log.jsonl").read_text().splitlines()]


def state():
    """Return what every file of the run holds, of the log what is not of its time."""
    files = {str(path): path.read_bytes() if path.is_file() else None for path in RUN.rglob("*")}
    lasting = [{name: value for name, value in entry.items() if name not in PASSING} for entry in entries()]
    return {**files, str(RUN / "log.jsonl"): lasting}


def is_unsettled():
    """Whether the model is not that of the last entry."""
    return entries()[-1]["model"] != Storage(str(RUN)).digest("model.safetensors")


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
        effray(TRAIN.format(name) + options)
        shutil.rmtree(folder / f"runs/deltagrad/{name}/plots")
    os.chdir(here)
    return folder


@pytest.fixture
def renew(template, tmp_path, monkeypatch):
    """Return a function that makes the run of this folder new again."""

    def renew():
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.copytree(template, tmp_path)
        monkeypatch.chdir(tmp_path)

    renew()
    return renew


def attacks(renew, line, act, kinds, onwards=False):
    """Yield how a command ends when attacked at each moment; afterwards it is finished, and its result compared."""
    effray(line)
    expected = state()
    for number in count(1, 1 if EVERY else 9 if line == LINES["stream"] else 4):
        renew()
        ended = attacked(line, act, number, kinds, onwards)
        if ended.code == 0:
            break
        yield number, ended
        effray("log a")
        if line.startswith("stream") or len(entries()) == 1:  # what has not been answered
            effray(line)
        assert state() == expected, number
    assert number > FEWEST


# Deaths


@EVERY_LINE
def test_killed_at_any_write_a_request_is_answered_once(renew, line):
    for _, ended in attacks(renew, line, death, STEPS):
        assert ended.code == DEATH


@EVERY_LINE
def test_interrupted_at_any_write_a_request_leaves_nothing_of_itself(renew, line):
    def interrupt():
        raise KeyboardInterrupt

    before = state()
    for number, ended in attacks(renew, line, interrupt, STEPS):
        answered = len(entries()) > 1
        rest = "; the run is as it was, and the same command starts again"
        rest = ", but the request is answered" if answered else rest
        rest = "; the same command answers the rest" if line.startswith("stream") else rest
        assert ended.line == f"effray: interrupted{rest}\n"
        assert answered or state() == before, number


@pytest.mark.parametrize("in_place", [False, True], ids=["before the model", "after the model"])
def test_killed_after_its_entry_a_deletion_is_in_force_for_every_reader(renew, in_place):
    def death_after_the_entry():
        if len(entries()) == 2 and is_unsettled() != in_place:
            death()

    assert attacked(LINES["delete"], death_after_the_entry, 1, STEPS, onwards=True).code == DEATH
    assert is_unsettled() != in_place
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
        effray(f"log {RUN.absolute()}")
    served = load_model("a").head.weight.detach()
    renew()
    effray(LINES["delete"])
    assert torch.equal(served, load_model("a").head.weight)


# Disks


@pytest.mark.usefixtures("renew")
def test_whatever_an_entry_names_is_on_the_disk_before_it():
    log = Path("operations").absolute()
    assert attacked(LINES["add"], death, 0, ALL, log=log).code == 0
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
def test_a_disk_that_is_full_from_any_write_on(renew, line):
    before = state()
    for number, ended in attacks(renew, line, full, WRITES, onwards=True):
        message, answered = ended.line, len(entries()) > 1
        assert "cannot write" in message and ("No space left" in message or "the disk is full" in message)
        assert answered or state() == before, number
        assert is_unsettled() <= ("the request is in force all the same" in message) <= answered, message


@EVERY_LINE
def test_a_disk_that_breaks_at_any_write_or_deletion(renew, line):
    for _, ended in attacks(renew, line, read_only, STEPS, onwards=True):
        assert ended.line


@pytest.mark.usefixtures("renew")
def test_a_read_only_run_can_be_looked_at_and_its_leftovers_are_named():
    effray(LINES["delete"])
    before = state()
    for line in ("log a", "verify a"):
        assert attacked(line, read_only, 1, onwards=True).code == 0
        assert state() == before
    (RUN / "versions/00007").mkdir()
    message = attacked("log a", read_only, 1, onwards=True).line
    assert "cannot delete" in message and "versions/00007': Read-only file system" in message


# Damage


def damage(path, other, kind, position, bits):
    content = bytearray(path.read_bytes())
    position %= max(1, len(content))
    flipped = content[:position] + bytes([content[position] ^ bits]) + content[position + 1 :] if content else b""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        cut, gap = content[:position], content[:position] + content[position + bits :]
        path.write_bytes({"foreign": other, "empty": b"", "cut": cut, "gap": gap, "flip": flipped}[kind])


KINDS = ("flip", "flip", "flip", "gap", "cut", "missing", "empty", "folder", "foreign")
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
    for name in ("a", "other"):
        effray(f"delete {name} --ids 1,2 --root {root}")
        effray(f"add {name} --data table:{template}/rows.csv --root {root}")
    return root


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    name=st.sampled_from(FILES), kind=st.sampled_from(KINDS), position=st.integers(0, 100_000), bits=st.integers(1, 255)
)
def test_a_damaged_file_is_named_or_the_result_is_right(answered, name, kind, position, bits):
    damaged = answered.parent / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(answered, damaged)
    sound = run(f"deltagrad log a --root {damaged}")
    other = (damaged / "deltagrad/other" / name).read_bytes()
    damage(damaged / "deltagrad/a" / name, other, kind, position, bits)
    ended = run(f"deltagrad log a --root {damaged}")
    assert ended == sound or Path(name).name in ended.line

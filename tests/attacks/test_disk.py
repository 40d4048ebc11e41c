"""A disk that is full, or whose user dies, at any write of any experiment: nothing is half-written, nothing is lost."""

import os
import shutil
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from disk import ALL, STEPS, Disk, death, full, quick
from forked import DEATH, Ended, effray
from run_files import check_whole, files

EVERY = os.environ.get("EFFRAY_EVERY_OPERATION")  # of each write, and not one of them in turn
SMALL = "--model linear --train.epochs 2 --train.batch_size 512 --cluster.workers 0"
LINES = {
    "train": f"train {SMALL}",
    "lipt": f"lipt {SMALL} --pretrain.models 2 --pretrain.epochs 1 --pretrain.batch_size 512",
    "crest": f"crest {SMALL.replace('512', '128')} --budget 0.5",
    "sparse": f"sparse {SMALL.replace('linear', 'mlp')}",
    "deltagrad": f"deltagrad train {SMALL}",
    "select": "select --model-from base --method grand --cluster.workers 0",
}


class Place(NamedTuple):
    """Where a run is tried, as often as it takes.

    Attributes:
        folder: to work in.
        template: what is there before each attempt.
        line: of the command, without its name.
        run: the run's folder.
    """

    folder: Path
    template: Path
    line: str
    run: Path

    def clear(self) -> None:
        shutil.rmtree(self.folder / "runs", ignore_errors=True)
        shutil.copytree(self.template, self.folder / "runs")

    def start(self, before: Callable[[], object]) -> Ended:
        return effray(f"{self.line} --name one", self.folder, before)

    def resume(self) -> Ended:
        return effray(f"{self.line.partition(' --')[0]} --resume one", self.folder, quick)


@pytest.fixture(params=LINES)
def place(request, tmp_path):
    kind = request.param
    folder = tmp_path / "work"
    template = tmp_path / "template"
    folder.mkdir()
    template.mkdir()
    if kind == "select":
        assert effray(f"{LINES['train']} --name base --root {template}", folder, quick).code == 0
    return Place(folder, template, LINES[kind], folder / "runs" / kind / "one")


def on(disk: Disk) -> Callable[[], None]:
    def before() -> None:
        quick()
        disk.install()

    return before


def undisturbed(place: Place, kinds: Any) -> tuple[dict[str, Any], list[str]]:
    """Run to the end; return the run's files and the operations that made them."""
    place.clear()
    log = place.folder / "operations"
    ended = place.start(on(Disk(place.folder / "runs", kinds=kinds, log=log)))
    assert ended.code == 0, ended
    return files(place.run), log.read_text().splitlines()


def end_equal(place: Place, expected: dict[str, Any], where: str) -> None:
    """Go on with whatever is left of a run, and compare."""
    ended = place.resume() if place.run.exists() else place.start(quick)
    assert ended.code == 0, (where, ended)
    found = files(place.run)
    assert found.keys() == expected.keys(), where
    assert [name for name in found if found[name] != expected[name]] == [], where


def chosen(operations: list[str]) -> list[int]:
    """Return the numbers of the operations to fail: of each file's in turn another one, or all."""
    numbers = []
    turns = cycle(ALL)
    kind = next(turns)
    for number, operation in enumerate(operations, 1):
        if operation.startswith(("mkdir", "open")) and "/versions" in operation:
            continue  # TODO: the folder of a history is not made in one line yet
        if EVERY or operation.startswith(f"{kind} "):
            numbers.append(number)
            kind = next(turns)
    return numbers


def test_a_disk_that_is_full_at_any_write(place):
    expected, operations = undisturbed(place, ALL)
    for number in chosen(operations):
        where = f"{number}: {operations[number - 1]}"
        place.clear()
        ended = place.start(on(Disk(place.folder / "runs", full, number, ALL)))
        assert "the disk is full" in ended.line or "No space left on device" in ended.line, where
        check_whole(place.folder / "runs")
        if EVERY or number % 2:
            end_equal(place, expected, where)


def test_a_death_before_any_step(place):
    expected, operations = undisturbed(place, STEPS)
    for number, operation in enumerate(operations, 1):
        where = f"{number}: {operation}"
        place.clear()
        ended = place.start(on(Disk(place.folder / "runs", death, number, STEPS)))
        assert ended.code == DEATH, where
        if place.run.exists() and not (place.run / "config.toml").exists():
            assert "it has no settings yet" in place.start(quick).line
            shutil.rmtree(place.run)
        end_equal(place, expected, where)

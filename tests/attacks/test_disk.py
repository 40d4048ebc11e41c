"""A disk that is full, or whose user dies, at any write of any experiment: nothing is half-written, nothing is lost."""

import os
import shutil
import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import samples
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
    "select": "select --model-from base --rule grand --cluster.workers 0",
}


class Place(NamedTuple):
    """Working folder in which a run is tried repeatedly."""

    folder: Path
    template: Path  # content before each attempt
    line: str  # the command without --name
    run: Path  # the run's folder

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
        if EVERY or not number % 3:  # the deaths below leave the same behind, or more
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


def test_the_disk_of_temporary_files_is_full(tmp_path):
    temporary = tmp_path / "temporary"
    work = tmp_path / "work"
    temporary.mkdir()
    work.mkdir()

    def before() -> None:
        tempfile.tempdir = str(temporary)
        Disk(temporary, full, 1, ["write"], onwards=True).install()

    line = f"{LINES['train']} --name one"
    assert "cannot draw 'curves' among the temporary files, see TMPDIR: No space" in effray(line, work, before).line
    assert not [*temporary.iterdir()]
    check_whole(work)
    assert effray("train --resume one", work).code == 0


@pytest.mark.parametrize("act", [full, death])
def test_the_disk_of_the_data_cache_is_full_or_its_user_dies(tmp_path, act):
    for split in ("train", "test"):
        samples.write_folder(tmp_path / "images" / split, samples.pixels(6), np.array([0, 0, 1, 1, 2, 2]))
    cache = tmp_path / "cache"
    line = f"data folder:{tmp_path / 'images'}"

    def describe(disk: Disk) -> Ended:
        def before() -> None:
            os.environ["EFFRAY_CACHE"] = str(cache)
            disk.install()

        return effray(line, tmp_path, before)

    log = tmp_path / "operations"
    kinds = ("open", "write", "close", "rename")
    expected = describe(Disk(cache, kinds=kinds, log=log))
    assert expected.code == 0, expected
    for number, operation in enumerate(log.read_text().splitlines(), 1):
        shutil.rmtree(cache)
        ended = describe(Disk(cache, act, number, kinds))
        if act is full:
            assert "cannot build the data cache" in ended.line, operation
            assert not [*cache.glob("*.tmp")], operation
        else:
            assert ended.code == DEATH, operation
        assert describe(Disk(cache)) == expected, operation

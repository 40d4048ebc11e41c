"""SIGKILL at random moments: whoever dies, the resumed run ends in the files of one that nobody touched.

    pytest -m chaos                       # a dozen kills
    EFFRAY_KILLS=100 pytest -m chaos      # as many as that

Files are compared byte for byte, on two workers too: the same workers add in the same order. Times and host facts are
left out.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from forked import Ended, Process, effray, start
from processes import Watch
from run_files import check_whole, files

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
KILLS = int(os.environ.get("EFFRAY_KILLS", "12"))
SEED = int(os.environ.get("EFFRAY_CHAOS_SEED", "0"))
# Files that hold times, those of a sweep beside its figures.
TIMED = ("environment.json", "results.parquet", "table.md", "report.html")
ATTEMPTS = 8  # to resume a run, at most
WATCHES: list[Watch] = []  # of all processes that were attacked

SMALL = "--model mlp --seed 3 --train.precision float32"
LINES = {
    "train": f"train {SMALL} --train.epochs 12 --select.rule gradmatch --select.fraction 0.2 --select.every_epochs 3",
    "lipt": f"lipt {SMALL} --train.epochs 12 --pretrain.models 3 --pretrain.epochs 3",
    "crest": f"crest {SMALL} --train.epochs 12 --budget 0.5",
    "sparse": f"sparse {SMALL} --train.epochs 12 --density 0.1 --growth gradient --agent",
    "deltagrad": f"deltagrad train {SMALL} --train.epochs 6 --train.batch_size 200",
    "select": "select --seed 3 --model-from base --rule craig",
    "embed": "embed --seed 3 --model-from base --draws 2 --precision float32 --rows-per-part 50",
    "stream": "deltagrad stream base queue",
    "text": "train --dataset text:{texts} --model transformer --seed 3 --train.epochs 6 --train.keep best",
    "tune": f"tune train {SMALL} --train.epochs 6 --samples 2 --concurrent 1 --scheduler fifo",
}
BASES = {
    "select": f"train {SMALL} --train.epochs 2",
    "embed": f"train {SMALL} --train.epochs 2",
    "stream": LINES["deltagrad"],
}
WORDS = "the a cat dog sat ran on under mat house red blue big small who where".split()
QUEUE = '{"delete": [3, 14], "id": "a"}\n{"delete": [15, 9], "id": "b"}\n{"restore": [14], "id": "c"}\n'
TRAINING = ("driver", "RayTrainWorker", "TrainController", "Mailbox", "raylet")
HOLDING = ("driver", "Holder", "raylet")
SWEEPING = ("driver", "TrialProcess", "raylet")
VICTIMS = dict.fromkeys(LINES, TRAINING) | {"select": HOLDING, "embed": HOLDING, "tune": SWEEPING}
NEVER = (("tune", 0), ("stream", 2))  # a sweep is on Ray, and a replay of so few samples is not


class Chain(NamedTuple):
    """A run and the kills that befall it."""

    kind: str
    workers: int  # of Ray; 0 = without it
    kills: tuple[tuple[str, float], ...]  # victims, and the share of their expected lives at which they die

    def __str__(self) -> str:
        return "-".join([self.kind, str(self.workers), *(victim for victim, _ in self.kills)])


def chains(kills: int, seed: int) -> list[Chain]:
    """Draw runs with up to three kills each: of every kind one on Ray for two without it, which are far quicker."""
    draws = random.Random(seed)
    drawn = []
    waiting: list[tuple[str, int]] = []
    while kills > 0:
        if not waiting:
            waiting = [(kind, workers) for kind in LINES for workers in (0, 2, 0) if (kind, workers) not in NEVER]
            draws.shuffle(waiting)
        kind, workers = waiting.pop()
        victims = VICTIMS[kind] if workers else ("driver",)
        count = min(kills, draws.randint(1, 3))
        drawn.append(Chain(kind, workers, tuple((draws.choice(victims), draws.random()) for _ in range(count))))
        kills -= count
    return drawn


class Undisturbed(NamedTuple):
    """A run without a kill."""

    files: dict[str, object]
    lives: dict[str, float]  # how long a process lived, seconds, by its title


class Command:
    """A command in a process of its own, which starts as a user's does."""

    def __init__(self, line: str, folder: Path):
        environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
        self._files = [folder.parent / "out", folder.parent / "err"]
        words = [sys.executable, "-m", "raypkg", *line.split()]
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self._process = subprocess.Popen(words, cwd=folder, env=environment, stdout=out, stderr=err)
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> Ended:
        code = self._process.wait()
        out, err = (file.read_text(errors="replace") for file in self._files)
        return Ended(code, out, err)


def command(line: str, workers: int, folder: Path) -> Command | Process:
    whole = f"{line} --cluster.workers {workers}"
    return Command(whole, folder) if workers else start(whole, folder)


def begun(kind: str, home: Path, folder: Path | None = None) -> str:
    """Return a command as it is first given, or the one that resumes its run in ``folder``, if it has settings."""
    line = LINES[kind].format(texts=home / "texts.csv")
    if kind == "stream":
        return line
    where = folder / "runs" / line.split()[0] / "one" if folder else None
    if where and (where / "config.toml").exists():
        return f"{line.partition(' --')[0]} --resume one"
    if where:  # as the line says, it is deleted
        shutil.rmtree(where, ignore_errors=True)
    return f"{line} --name one"


def left(kind: str, folder: Path) -> dict[str, object]:
    """Return the files that a run and, of a sweep, its trials have left."""
    kinds = {"stream": ["deltagrad/base"], "tune": ["tune/one", "train/one-001", "train/one-002"]}
    content: dict[str, object] = {}
    for name in kinds.get(kind, [f"{LINES[kind].split()[0]}/one"]):
        content |= {f"{name}/{file}": value for file, value in files(folder / "runs" / name).items()}
    return {name: value for name, value in content.items() if not name.endswith(TIMED)}


@cache
def prepared(kind: str, home: Path) -> Path:
    """Return a folder with the run that a kind of run needs, and nothing else."""
    folder = home / f"base-{kind}"
    folder.mkdir()
    (folder / "queue").write_text(QUEUE)
    if kind in BASES:
        assert effray(f"{BASES[kind]} --name base --cluster.workers 0", folder).code == 0
    return folder


@cache
def undisturbed(kind: str, workers: int, home: Path) -> Undisturbed:
    """Return what a run leaves that nobody touches, and who lived when."""
    folder = home / f"undisturbed-{kind}-{workers}" / "work"
    shutil.copytree(prepared(kind, home), folder)
    begin = time.monotonic()
    process = command(begun(kind, home), workers, folder)
    with Watch(process.pid) as watch:
        ended = process.end()
    assert ended.code == 0, ended
    lives = {title: times[-1] - times[0] for title, times in watch.times.items()}
    lives["driver"] = time.monotonic() - begin
    return Undisturbed(left(kind, folder), lives)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    draws = random.Random(0)
    rows = [f"{' '.join(draws.choices(WORDS, k=draws.randint(2, 12)))},{i % 3}\n" for i in range(200)]
    (folder / "texts.csv").write_text("".join(["text,label\n", *rows]))
    return folder


@pytest.mark.parametrize("chain", chains(KILLS, SEED), ids=str)
def test_whoever_dies_a_resumed_run_ends_as_one_that_nobody_touched(chain, home, tmp_path):
    expected = undisturbed(chain.kind, chain.workers, home)
    folder = tmp_path / "work"

    def fresh() -> str:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(prepared(chain.kind, home), folder)
        return begun(chain.kind, home)

    def check_equal() -> None:
        check_whole(folder / "runs")
        here = left(chain.kind, folder)
        names = here.keys() | expected.files.keys()
        assert sorted(name for name in names if here.get(name) != expected.files.get(name)) == []

    line = fresh()
    for victim, share in chain.kills:
        ended = struck = None
        while not struck:  # a run that was done before its time is checked, and begun again to be killed earlier
            if ended:
                line = fresh()
            ended, struck = attempt(line, chain, folder, victim, share * expected.lives.get(victim, 0))
            assert struck or ended.code == 0, ended
            if ended.code == 0:
                check_equal()
            share /= 2
        line = begun(chain.kind, home, folder)
    for _ in range(ATTEMPTS):
        if ended.code == 0:
            break
        ended = command(line, chain.workers, folder).end()
        line = begun(chain.kind, home, folder)
    assert ended.code == 0, ended
    check_equal()


def attempt(line: str, chain: Chain, folder: Path, victim: str, seconds: float) -> tuple[Ended, bool]:
    """Run a command and kill somebody who has lived for a while; return its end, and whether there was somebody."""
    process = command(line, chain.workers, folder)
    with Watch(process.pid) as watch:
        target = psutil.Process(process.pid) if victim == "driver" else None
        while target is None and process.running:
            target = watch.find(victim)
            time.sleep(0.02)
        time.sleep(seconds)
        struck = target is not None and process.running
        if struck:
            with suppress(psutil.NoSuchProcess):
                (watch.find(victim) or target).kill()
        ended = process.end()
    WATCHES.append(watch)
    # Ray ends a driver that is just connecting to a raylet that dies, before any phase has said anything.
    out = ended.out.partition("\x1b[33m(raylet)")[0]  # Ray itself may say that the raylet died
    is_connecting = not out or out.endswith("…\n")
    is_speechless = victim == "raylet" and is_connecting and (ended.code, ended.err) == (1, "")
    if ended.code > 0 and not is_speechless:  # not the one that was killed: it has something to say
        assert ended.line
    return ended, struck


def test_nobody_outlives_an_attack():
    assert [title for watch in WATCHES for title in watch.left()] == []

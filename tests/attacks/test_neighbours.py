"""Other processes, people and machines: two at one run, roots that cannot be written, orders to end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import samples
from disk import Disk, quick, read_only
from forked import Ended, Process, effray, start
from run_files import check_whole, files

SMALL = "--model linear --train.epochs 2 --train.batch_size 512 --cluster.workers 0"
SLOW = f"{SMALL.replace('epochs 2', 'epochs 40')} --dataset sabotage:load_slowly"


@pytest.fixture
def folder(tmp_path):
    """A working folder, beside which a process keeps what it says."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def when(process: Process, text: str) -> None:
    """Wait until a process has said something."""
    end = time.monotonic() + 60
    while text not in process.said:
        assert time.monotonic() < end, (text, process.said)
        time.sleep(0.01)


# Roots


def test_a_root_that_cannot_be_written(folder):
    effray(f"train {SMALL} --name base", folder, quick)
    disk = Disk(folder, read_only, 1, onwards=True)

    def before() -> None:
        quick()
        disk.install()

    for line in (f"train {SMALL} --name one", "select --model-from base --name one --cluster.workers 0"):
        assert "Read-only file system" in effray(line, folder, before).line
        assert sorted(path.name for path in (folder / "runs").rglob("one")) == []
    for line in ("show base", "train --resume base"):
        assert effray(line, folder, before).code == 0


@pytest.mark.parametrize("command", [f"train {SMALL}", f"train {SMALL} --name one", "train --resume one", "show one"])
@pytest.mark.parametrize("root", ["file", "file/below", "\udcff", "dangling", "/proc/none", "a\tb"])
def test_a_root_that_is_none(folder, root, command):
    (folder / "file").touch()
    (folder / "dangling").symlink_to(folder / "nowhere" / "at" / "all")
    line = f"{command} --root '{root}'"
    if root == "a\tb" and command.startswith(f"train {SMALL}"):
        assert effray(line, folder, quick).code == 0
    else:
        assert effray(line, folder, quick).line


def test_a_root_that_is_a_link_and_a_working_folder_that_was_deleted(folder):
    def before() -> None:
        quick()
        (folder / "gone").mkdir()
        os.chdir(folder / "gone")
        (folder / "gone").rmdir()

    (folder / "disk").mkdir()
    (folder / "runs").symlink_to(folder / "disk")
    assert effray(f"train {SMALL} --name one", folder, quick).code == 0
    assert (folder / "disk" / "train" / "one" / "summary.json").exists()
    assert effray("select --model-from one --name two --cluster.workers 0", folder, quick).code == 0
    for line in ("list", f"train {SMALL} --root {folder}/runs"):
        assert "the working folder has been deleted" in effray(line, folder, before).line


@pytest.mark.parametrize("what", ["runs/train/one", "runs"])
def test_a_run_folder_that_is_deleted_while_it_runs(folder, what):
    run = start(f"train {SLOW} --name one", folder)
    when(run, "train 4/40")
    shutil.move(folder / what, folder / "elsewhere")
    shutil.rmtree(folder / "elsewhere")
    assert "its folder has been deleted" in run.end().line
    assert not (folder / what).exists()


# Two processes


def test_two_that_resume_one_run(folder):
    run = start(f"train {SLOW} --name one", folder)
    when(run, "train 4/40")
    os.kill(run.pid, signal.SIGKILL)
    run.end()
    first = start("train --resume one", folder)
    when(first, "train 8/40")
    assert "run 'one' is being worked on by another process" in effray("train --resume one", folder).line
    assert first.end().code == 0
    assert effray(f"train {SLOW} --name two", folder).code == 0
    one, two = (files(folder / "runs" / "train" / name) for name in ("one", "two"))
    assert [name for name in one if one[name] != two[name]] == []


def test_a_new_run_that_another_process_resumes_at_once_is_left_to_it(folder):
    def before() -> None:
        from raypkg.cli import execute

        create = execute.create

        def create_slowly(*arguments):
            made = create(*arguments)
            print("made", flush=True)
            time.sleep(1)
            return made

        execute.create = create_slowly

    slow = start(f"train {SLOW} --name one", folder, before)
    when(slow, "made")
    fast = start("train --resume one", folder)
    when(fast, "train one")
    assert "being worked on by another process" in slow.end().line
    assert fast.end().code == 0 and "test accuracy" in effray("show one", folder).out


def test_two_that_begin_a_run_of_one_name(folder):
    runs = [start(f"train {SMALL} --seed {seed} --name one", folder, quick) for seed in (1, 2, 3)]
    ended = [run.end() for run in runs]
    assert sorted(each.code for each in ended) == [0, 2, 2]
    assert all("run 'one' exists" in each.line for each in ended if each.code)
    winner = [each.code for each in ended].index(0) + 1
    assert f"seed = {winner}\n" in (folder / "runs" / "train" / "one" / "config.toml").read_text()


@pytest.mark.parametrize("kind", ["train", "deltagrad train", "lipt"])
def test_who_looks_on_while_it_runs(folder, kind):
    settings = "--pretrain.models 2 --pretrain.epochs 20" if kind == "lipt" else ""
    run = start(f"{kind} {SMALL.replace('epochs 2', 'epochs 60')} {settings} --name one", folder, quick)
    looks = 0
    while run.running:
        for line in ("show one", "show one --against one", "export one", "select --model-from one --cluster.workers 0"):
            seen = effray(line, folder, quick)
            assert seen.code == 0 or seen.line
            looks += 1
    assert run.end().code == 0 and looks > 4


# The output


@pytest.mark.parametrize(
    ("ending", "code", "says"),
    [
        ("| true", 0, ""),
        ("| head -1", 0, ""),
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        ("> /dev/full", 1, "effray: cannot write the output: No space left on device\n"),
        ("--resume none 2> /dev/full", 2, ""),
        ("--nope 2> /dev/full", 2, ""),
        ("--nope 2>&- >&-", 2, ""),
    ],
)
def test_a_run_whose_output_goes_nowhere_is_finished_and_kept(folder, ending, code, says):
    line = f"set -o pipefail; PYTHONIOENCODING=ascii {sys.executable} -m raypkg train {SMALL} --name one {ending}"
    ended = subprocess.run(["bash", "-c", line], cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (code, says)
    check_whole(folder / "runs")
    assert (folder / "runs/train/one/summary.json").exists() == (code < 2)


def test_a_working_folder_that_is_deleted_while_a_run_is_going(folder):
    (folder / "work").mkdir()
    run = start(f"train {SLOW} --name one --root {folder}/runs", folder / "work")
    when(run, "train 4/40")
    (folder / "work").rmdir()
    assert run.end().code == 0
    check_whole(folder / "runs")


CONTROLS = "\x1b]0;title\x07\u202edrawkcab"
SHOWN = r"\x1b]0;title\x07\u202edrawkcab"


def test_no_text_of_others_controls_the_terminal(folder):
    for split in ("train", "test"):
        samples.write_folder(folder / "images" / split, samples.pixels(4), [0, 0, 1, 1])
        (folder / "images" / split / samples.CLASSES[0]).rename(folder / "images" / split / CONTROLS)
    (folder / "bad").mkdir()
    (folder / "bad" / f"{CONTROLS}.csv").write_text("a,b\n")
    root = folder / CONTROLS
    assert effray(f"train {SMALL} --name one --root '{root}'", folder, quick).code == 0
    summary = root / "train/one/summary.json"
    values = json.loads(summary.read_text())
    summary.write_text(json.dumps(values | {"findings": [f"class {CONTROLS}"]}))
    lines = ["show one", "list", "report one", "show none", "rm one --yes", f"train {SMALL} --dry-run"]
    lines = [f"{line} --root '{root}'" for line in lines]
    lines += ["data folder:images", f"data 'table:bad/{CONTROLS}.csv'", f"select --config 'bad/{CONTROLS}.csv'"]
    for line in lines:
        ended = effray(line, folder, quick)
        told = ended.out + ended.err
        assert "Traceback" not in told and not {"\x1b", "\x07", "\u202e"} & set(told), line
        assert SHOWN in told or line.startswith("list"), told


# The clock


@pytest.mark.parametrize("jump", [-86400, 86400])
def test_a_clock_that_jumps(folder, jump):
    def before() -> None:
        now, monotonic = time.time, time.monotonic
        turns = iter(range(10**9))
        time.time = lambda: now() + jump * (next(turns) % 2)
        time.monotonic = lambda: monotonic() + jump * (next(turns) % 2)

    for _ in range(2):
        assert effray(f"train {SMALL}", folder, before).code == 0
    made = [*(folder / "runs" / "train").iterdir()]
    assert len(made) == 2
    for run in made:
        assert "-" not in (run / "summary.json").read_text().partition('"elapsed": ')[2][:2]


# Orders to end


def ordered(number: int, folder: Path, shows: str, root: str, before=lambda: None) -> Ended:
    """Return the end of a run that is sent a signal when it shows a text."""
    run = start(f"train {SLOW} --name one --root {root}", folder, before)
    when(run, shows)
    os.kill(run.pid, number)
    return run.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_order_to_end_says_how_to_go_on_and_leaves_no_folder_before_any_result(folder, number):
    assert ordered(number, folder, "train one", "some").line == "effray: interrupted\n"
    assert not [*folder.rglob("one")]
    line = ordered(number, folder, "train 4/40", "some").line
    assert line == "effray: interrupted; resume with: effray train --resume one --root some\n"
    check_whole(folder / "some")
    assert effray("train --resume one --root some", folder).code == 0
    assert effray(f"train {SLOW} --name one", folder).code == 0
    one, two = (files(folder / root / "train" / "one") for root in ("some", "runs"))
    assert [name for name in one if one[name] != two[name]] == []


def test_an_order_that_is_ignored_stays_so(folder):
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does

    assert ordered(signal.SIGHUP, folder, "train 4/40", "some", ignore).code == 0

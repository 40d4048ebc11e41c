"""Runs on S3, here a server of this machine's own: everything that a local disk can."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow import fs

from bucket import BUCKET, query
from disk import death, quick
from forked import DEATH, Process, effray, start
from raypkg.core.config import load_settings
from raypkg.experiments import embedding
from raypkg.experiments.train import TrainSettings
from raypkg.runs.folder import create
from raypkg.runs.storage import CLAIMS, Storage
from run_files import files
from test_embedding import EMBED, killed_after

SMALL = "--model linear --train.epochs 2 --train.batch_size 512 --cluster.workers 0"
LIPT = f"lipt {SMALL} --pretrain.models 2 --pretrain.epochs 1 --pretrain.batch_size 512"


def done(line: str, folder: Path) -> str:
    """Run a command that succeeds, and return what it printed."""
    ended = effray(line, folder, quick)
    assert (ended.code, ended.err) == (0, ""), ended
    return ended.out


def copied(root: str, run: str, folder: Path) -> Path:
    """Copy a run to a local folder."""
    remote = Storage(f"{root}#/{run}")
    fs.copy_files(remote._path, str(folder / run), source_filesystem=remote._fs)
    return folder / run


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The files of the same run on a local disk."""
    folder = tmp_path_factory.mktemp("local")
    done(f"{LIPT} --name one", folder)
    return files(folder / "runs" / "lipt" / "one")


@pytest.mark.parametrize("uploads", [None, 4, 9, 14])
def test_a_run_there_equals_one_on_a_disk_wherever_it_is_killed(root, tmp_path, expected, uploads):
    def die() -> None:
        upload = Storage._upload
        left = iter(range(uploads))

        def counted(*arguments):
            if next(left, None) is None:
                death()
            upload(*arguments)

        quick()
        Storage._upload = counted

    if uploads is None:
        done(f"{LIPT} --name one --root '{root}'", tmp_path)
    else:
        assert effray(f"{LIPT} --name one --root '{root}'", tmp_path, die).code == DEATH
        assert "one: not finished" in done(f"show one --root '{root}'", tmp_path)
        done(f"lipt --resume one --root '{root}'", tmp_path)
    found = files(copied(root, "lipt/one", tmp_path))
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def test_an_embedding_there_is_that_of_a_local_run_when_it_is_killed(root, tmp_path):
    assert effray(EMBED, tmp_path).code == 0
    place = f"--root '{root}'"
    assert effray(f"{EMBED} {place}", tmp_path, lambda: killed_after(4)).code == -signal.SIGKILL
    assert effray(f"embed --resume one --cluster.workers 0 {place}", tmp_path).code == 0
    remote = Storage(root) / "embed" / "one"
    assert not remote.list(embedding.PARTS)
    for file in ("train.parquet", "test.parquet"):
        assert remote.read(file) == (tmp_path / "runs/embed/one" / file).read_bytes()


@pytest.fixture
def runs(root):
    """Two runs, of which the first is done."""
    settings = load_settings(TrainSettings, None, {"model": "linear", "train.epochs": 5})
    one, two = (create(root, "train", name, settings) for name in ("one", "two"))
    phases = [{"phase": "train", "backward": 7}]
    costs = {"seconds": 1.5, "elapsed": 2.0, "samples": 7, "full_training_backward": 7}
    one.finish({"phases": phases, "test_accuracy": 0.5, "test_loss": 1.0, "coreset": None, **costs})
    two.log({"phase": "train", "main": True, "epoch": 1, "loss": 1.0})
    two.flush()


def test_list_show_and_rm_of_runs_there(root, runs, tmp_path):
    at = f"--root '{root}'"
    assert {line.split()[0]: line.split()[1:6] for line in done(f"list {at}", tmp_path).splitlines()[2:]} == {
        "one": "done digits linear train 50.00%".split(),
        "two": "unfinished digits linear train –".split(),
    }
    text = done(f"show two {at}", tmp_path)
    assert text.startswith("two: not finished, and it is unknown whether a process is working on it")
    assert "1 of 5" in text and "last written " in text
    assert f"resume with: effray train --resume two {at}" in text
    before = Storage(root).list("train/two")
    assert done(f"rm one --yes {at}", tmp_path).startswith("deleted s3://bucket/runs")
    assert Storage(root).list("train") == ["two"] and Storage(root).list("train/two") == before
    done(f"rm two --yes {at}", tmp_path)
    assert done(f"list {at}", tmp_path) == f"no runs in {root}\n"


def test_a_deletion_there_that_was_cut_short_leaves_no_finished_run(root, runs, tmp_path):
    def interrupt(storage, name, last):
        raise KeyboardInterrupt

    line = f"rm one --yes --root '{root}'"
    assert effray(line, tmp_path, lambda: setattr(Storage, "delete_folder", interrupt)).code
    assert "summary.json" not in Storage(root).list("train/one")
    done(line, tmp_path)
    assert Storage(root).list("train") == ["two"]


def test_what_is_done_with_runs_there(root, port, tmp_path):
    at = f"--root '{root}'"
    done(f"{LIPT} --name one {at}", tmp_path)
    assert "test accuracy" in done(f"show one {at}", tmp_path)
    assert "test accuracy" in done(f"show '{root}#/lipt/one'", tmp_path)
    assert "test accuracy" in done(f"show 's3://{BUCKET}/runs/lipt/one?{query(port)}'", tmp_path)
    done(f"select --model-from one --rule grand --name two --cluster.workers 0 {at}", tmp_path)
    assert "picks in common" in done(f"show one --against two {at}", tmp_path)
    coreset = f"s3://{BUCKET}/runs/select/two/coreset.parquet?{query(port)}"
    assert "of 1,295 samples (10.0%)" in done(f"train {SMALL} --coreset '{coreset}' {at}", tmp_path)
    done(f"sparse {SMALL.replace('linear', 'mlp')} --density 0.1 --name thin {at}", tmp_path)
    assert "thin-csr: csr" in done(f"export thin {at}", tmp_path)

    def predict() -> None:
        import raypkg

        assert raypkg.load_model("one", root).classes
        assert raypkg.load_model(f"{root}#/lipt/one").classes

    ended = Process(predict, tmp_path).end()
    assert ended.code == 0, ended


def test_trials_there_take_over_first_phases(root, tmp_path):
    chosen = f"{SMALL} --rows none --cases gradmatch,el2n --seeds 0 --name c --root '{root}'"
    assert "pretrain of 10 of 12 trials are taken over" in done(f"compare lipt {chosen}", tmp_path)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"deltagrad train {SMALL}", "a history is memory-mapped, so the run must be in a local folder"),
        *((f"train {SMALL} --name '{name}'", "--name") for name in ("../x", "#x", "%2e%2e")),
        ("show '{root}#/../x'", "cannot be .."),
        ("show ..", "Allowed: none"),
    ],
)
def test_a_history_needs_a_local_disk_and_no_name_leaves_the_root(root, tmp_path, command, message):
    assert message in effray(f"{command.format(root=root)} --root '{root}'", tmp_path).line
    assert "Allowed: none" in effray(f"show one --root '{root}'", tmp_path).line


def test_of_two_that_want_a_name_none_is_a_second_and_it_is_free_after_both_gave_way(root, tmp_path):
    runs = [start(f"train {SMALL} --seed {seed} --name one --root '{root}'", tmp_path) for seed in (1, 2)]
    ended = [run.end() for run in runs]
    assert all(each.code == 0 or "run 'one' exists" in each.line for each in ended)
    assert sum(each.code == 0 for each in ended) <= 1
    again = effray(f"train {SMALL} --name one --root '{root}'", tmp_path)
    assert (again.code == 0) == all(each.code == 2 for each in ended), again
    folder = Storage(f"{root}#/train/two")  # as two leave it that gave way to each other
    folder.write(f"{CLAIMS}/x", b"")
    folder.delete(f"{CLAIMS}/x")
    done(f"train {SMALL} --name two --root '{root}'", tmp_path)


@pytest.mark.parametrize("what", ["no bucket", "no server", "a server that says nothing", "no region", "wrong URI"])
def test_what_is_not_there_is_told_within_20_seconds(port, tmp_path, what):
    silent = socket.create_server(("127.0.0.1", 0))  # accepts, and never answers
    roots = {
        "no bucket": f"s3://nobody/runs?{query(port)}",
        "no server": f"s3://{BUCKET}/runs?{query(1)}",
        "a server that says nothing": f"s3://{BUCKET}/runs?{query(silent.getsockname()[1])}",
        "no region": f"s3://{BUCKET}/runs?region=nowhere-1&endpoint_override=http://127.0.0.1:1&scheme=http",
        "wrong URI": f"s3://{BUCKET}/runs?nonsense=1",
    }
    commands = [f"train {SMALL} --name one", f"train {SMALL}", "show one"]
    for command in commands[:1] if "nothing" in what else commands:
        begun = time.monotonic()
        ended = effray(f"{command} --root '{roots[what]}'", tmp_path)
        assert ended.line and time.monotonic() - begun < 20, (command, ended)
    silent.close()


def test_credentials_are_neither_printed_nor_kept(root, port, tmp_path):
    secret = f"s3://KEY:S%2FCRET@{BUCKET}/runs?{query(port)}"
    ended = effray(f"train {SMALL} --name one --root '{secret}'", tmp_path)
    assert ended.code == 0, ended
    said = [effray(f"{command} --root '{secret}'", tmp_path) for command in (f"train {SMALL} --name one", "show two")]
    assert all("CRET" not in each.line for each in said)
    run = copied(root, "train/one", tmp_path)
    for file in run.rglob("*"):
        assert not file.is_file() or b"CRET" not in file.read_bytes()
    given = effray(f"train {SMALL} --coreset 's3://KEY:S%2FCRET@{BUCKET}/x?{query(port)}' --root '{root}'", tmp_path)
    assert "credentials in its URI" in given.line and "CRET" not in given.line


def test_a_process_ends_without_a_word_of_the_connection(root, tmp_path):
    done(f"train {SMALL} --name one --root '{root}'", tmp_path)
    command = [sys.executable, "-m", "raypkg", "show", "one", "--root", root]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert (ended.returncode, ended.stderr) == (0, "")

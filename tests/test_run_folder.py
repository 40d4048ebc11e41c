"""Run folders: whole files or none, metrics that survive restarts, names that are found."""

import errno
import fcntl
import os
import pickle

import pyarrow as pa
import pytest

import disk
from forked import Process
from raypkg.core.address import folder_and_name
from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment
from raypkg.experiments.coreset_files import compare
from raypkg.runs.folder import RunFolder, create
from raypkg.runs.storage import Storage


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path))


MANIFEST = {"phases": [], "coreset": 2, "seconds": 1.0, "elapsed": 1.0, "full_training_backward": 8}


@pytest.mark.parametrize("kind", disk.ALL)
def test_a_full_disk_leaves_nothing_half_written(storage, tmp_path, kind):
    storage.write("a.txt", b"old")

    def write():
        disk.Disk(tmp_path, disk.full, 1, [kind]).install()
        with pytest.raises(UserError, match=r"cannot write .*a.txt.*: the disk is full"):
            storage.write("new/a.txt" if kind == "mkdir" else "a.txt", b"new")

    ended = Process(write, tmp_path).end()
    assert ended.code == 0, ended
    assert storage.list() == [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert storage.read("a.txt") in (b"old", b"new")  # new where only the folder could not be synced


def test_an_interrupted_write_leaves_nothing_half_written(storage, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.write("a.txt", b"new")
    assert not list(tmp_path.iterdir())


def test_a_write_recreates_no_deleted_folder(storage):
    storage.write("run/a", b"")
    folder = (storage / "run").owned
    (folder / "phases").write("a", b"")
    storage.delete_folder("run")
    with pytest.raises(UserError, match=r"cannot write '.*run/phases/a': its folder has been deleted"):
        pickle.loads(pickle.dumps(folder / "phases")).write("a", b"")


@pytest.mark.parametrize("linked", [("notes",), ("notes", "checkpoints")])
def test_finishing_a_run_deletes_what_the_dead_left_but_nothing_of_the_users(tmp_path, linked):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    storage = Storage(str(run))
    storage.write("plots/a.png", b"")
    if "checkpoints" not in linked:
        storage.write("checkpoints/train/epoch_00001.pt", b"")
    elsewhere.mkdir()
    for link in linked:
        (run / link).symlink_to(elsewhere)
    for leftover in ("a.json.1.part", "plots/b.png.2.part", "mine.part", "notes/movie.mkv.1.part"):
        (run / leftover).touch()
    RunFolder(storage).finish(MANIFEST)
    found = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["a.png", "mine.part", "movie.mkv.1.part", "summary.json"] and not (run / "checkpoints").exists()


@pytest.mark.parametrize(
    ("address", "folder", "name"),
    [
        ("one.parquet", ".", "one.parquet"),
        ("/one.parquet", "/", "one.parquet"),
        ("a?b/c#d/one", "a?b/c#d", "one"),
        ("s3://b/runs/one?e=http://h:1&scheme=http", "s3://b/runs?e=http://h:1&scheme=http", "one"),
        ("s3://b?e=http://h:1#/runs/one", "s3://b?e=http://h:1#/runs", "one"),
        ("file:///a/%5Bx%5D", "file:///a", "[x]"),
    ],
)
def test_the_folder_and_the_name_of_a_file(address, folder, name):
    assert folder_and_name(address) == (folder, name)


def test_names_are_joined_to_uris_with_a_query_and_without(tmp_path):
    for base in (f"file://{tmp_path}", f"file://{tmp_path}?a=b/c&d=e", str(tmp_path)):
        run = Storage(base) / "train" / "[größe]=1"
        run.write("a/b", b"1")
        for same in (Storage(run.root), Storage(run.uri), Storage(f"{run.root}/a").parent, run.parent / run.name):
            assert same.read("a/b") == b"1" and same.name == "[größe]=1" and same.parent.name == "train"
    assert (tmp_path / "train" / "[größe]=1" / "a" / "b").exists()


@pytest.mark.parametrize(
    "root",
    ["file:///tmp#/../x", "s3:b", "\udcff", "~nobody-of-that-name/x", "s3://b/a b", "s3://", "a\0", "nonsense://x"],
)
def test_what_is_no_folder_is_refused_in_one_line(root):
    with pytest.raises(UserError, match="cannot use"):
        Storage(root)


def test_a_folder_is_one_process_s_at_a_time(storage):
    storage.write("a", b"")
    with storage.locked("run 'a'"):
        with pytest.raises(UserError, match="run 'a' is being worked on by another process"), storage.locked("run 'a'"):
            pass
    with pytest.raises(BlockingIOError), storage.locked("run 'a'"):  # not mistaken for the folder's
        raise BlockingIOError
    with storage.locked("run 'a'"):
        pass


def test_a_file_system_without_locks_keeps_nobody_out(storage, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSYS, "no locks")

    storage.write("a", b"")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with storage.locked("run 'a'"), storage.locked("run 'a'"):
        pass


def test_compare_counts_common_picks_and_correlates_scores(tmp_path):
    def finished(name, samples, picks, scores=None):
        storage = Storage(str(tmp_path)) / name
        storage.write_table("coreset.parquet", pa.table({"index": picks, "weight": [1.0, 1.0]}))
        if scores:
            storage.write_table("scores.parquet", pa.table({"index": list(range(samples)), "score": scores}))
        storage.write_json("summary.json", MANIFEST | {"samples": samples})
        return RunFolder(storage)

    a, b = (finished(name, 4, picks, [1.0, 2.0, 3.0, 4.0]) for name, picks in (("a", [0, 1]), ("b", [1, 2])))
    line = compare(a, b)
    assert "rank correlation of the scores 1.000; 1 of 2 picks in common (50.0%; by chance 50.0%)" in line
    c, d = (finished(name, samples, [0, 1]) for name, samples in (("c", 4), ("d", 5)))
    assert compare(a, c) == "a against c: 2 of 2 picks in common (100.0%; by chance 50.0%)"
    with pytest.raises(UserError, match="c chose from 4 samples and d from 5: same data set"):
        compare(c, d)
    with pytest.raises(UserError, match=r"e is not finished: there is no coreset\.parquet to compare"):
        compare(a, RunFolder(Storage(str(tmp_path)) / "e"))


def test_rows_are_in_the_order_of_models_and_epochs_and_one_after_a_restart_replaces_the_old_one(tmp_path):
    folder = create(str(tmp_path), "lipt", "one", Experiment())
    arrived = [("b", 1, 2), ("b", 0, 1), ("b", 1, 1), ("b", 0, 2), ("a", None, 2), ("a", None, 1)]
    for phase, model, epoch in arrived:
        folder.log({"phase": phase, "model": model, "epoch": epoch, "loss": 1.0})
    folder.flush()
    again = RunFolder(folder.storage)
    again.log({"phase": "a", "model": None, "epoch": 2, "loss": 0.5})
    kept = [(row["phase"], row.get("model"), row["epoch"]) for row in again.rows]
    assert kept == [("b", 0, 1), ("b", 0, 2), ("b", 1, 1), ("b", 1, 2), ("a", None, 1), ("a", None, 2)]
    assert [row["loss"] for row in again.rows] == [1.0] * 5 + [0.5] and folder.started


def test_a_run_does_not_write_into_a_later_one_of_its_name(tmp_path):
    first = create(str(tmp_path), "train", "one", Experiment())
    with first.storage.locked("run"):  # its folder is open, so that no other gets its number
        (tmp_path / "train" / "one").rename(tmp_path / "gone")
        create(str(tmp_path), "train", "one", Experiment(seed=1))
        for storage in (first.storage, pickle.loads(pickle.dumps(first.storage)) / "phases"):
            with pytest.raises(UserError, match="its folder has been deleted"):
                storage.write("a", b"")
    assert not (tmp_path / "train" / "one" / "a").exists()

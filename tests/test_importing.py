"""Imports of streamed stores: interrupted, concurrent, of changing files. All leave the same files, bit for bit."""

import json
import os
import re
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import fs

import samples
from contracts.test_datasets import PREPARE
from forked import Process
from raypkg.core.address import opened
from raypkg.core.errors import UserError
from raypkg.data import load_data
from raypkg.data.sources import classics, image_files, table, text
from raypkg.data.store import images, streamed
from raypkg.data.store.streamed import DIGEST, Stream
from test_object_sources import same

N = 120
LABELS = np.arange(N) * 3 // N
FILE = 20  # images of a parquet file, which are read as 8, 8 and 4


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A store has several parts, each several blocks; one of four encoded images contributes to the statistics."""
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(streamed, "PART_BYTES", 2000)
    monkeypatch.setattr(images, "SAMPLED", 40)
    monkeypatch.setattr(image_files, "READ_AT_ONCE", 8)
    for module, name in ((classics, "BLOCK"), (table, "SPARSE_BLOCK"), (table, "BLOCK"), (text, "BLOCK")):
        monkeypatch.setattr(module, name, 8)


class Killed(BaseException):
    """Ends an import as Ctrl-C does."""


def kill():
    raise Killed


def pictures(folder, colour_from=0):
    """Write 120 images as parquet, grey ones before a number."""
    for split, seed in {"train": 0, "test": 1}.items():
        colours, greys = samples.pixels(N, seed=seed), samples.pixels(N, channels=1, seed=seed)
        encoded = [samples.encode(colours[i] if i >= colour_from else greys[i]) for i in range(N)]
        for i in range(0, N, FILE):
            part = slice(i, i + FILE)
            samples.write_parquet(folder / f"{split}-{i:03}.parquet", encoded[part], LABELS[part])
    return f"parquet:{folder}"


SOURCES = ["parquet", "parquet, encoded", "folder", "folder, encoded", "table", "libsvm", "text", "cifar10"]
PLACES = [*((name, "folder") for name in SOURCES), ("parquet, encoded", "bucket")]
everywhere = pytest.mark.parametrize(("source", "stream"), PLACES, indirect=True)
in_both_places = pytest.mark.parametrize(
    ("source", "stream"), [("parquet, encoded", "folder"), ("table", "bucket")], indirect=True
)
in_both_kinds = pytest.mark.parametrize("source", ["parquet", "parquet, encoded"], indirect=True)


@pytest.fixture
def source(request, tmp_path, monkeypatch):
    """A source by its name, by default images of parquet that are stored as pixels."""
    name, _, encoded = getattr(request, "param", "parquet").partition(",")
    if encoded:
        monkeypatch.setattr(images, "DECODED_BYTES", 0)
    monkeypatch.setenv("EFFRAY_CACHE", str(tmp_path / "torchvision"))
    monkeypatch.setattr("contracts.test_datasets.LABELS", LABELS)
    folder = tmp_path / "data"
    return pictures(folder) if name == "parquet" else PREPARE[name](folder, monkeypatch)


@pytest.fixture
def stream(request, tmp_path):
    """Location of a disturbed import, by default a folder."""
    in_bucket = getattr(request, "param", "folder") == "bucket"
    address = request.getfixturevalue("bucket")("stores") if in_bucket else str(tmp_path / "stores")
    return Stream(address, 4, tmp_path / "copies")


def contents(stream):
    """Return the content of every file in a store."""
    system, root = opened(stream.address)
    entries = system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    files = [entry.path for entry in entries if entry.type == fs.FileType.File]
    return {path.removeprefix(root): system.open_input_file(path).read() for path in files}


def endings(stream):
    return {re.split(r"[./]", name)[-1] for name in contents(stream) if "-train-" in name}


@pytest.fixture
def undisturbed(source, tmp_path):
    """Import the source elsewhere; return its train split and its files."""
    elsewhere = Stream(str(tmp_path / "undisturbed"), 4, tmp_path / "copies")
    split = load_data(source, cache=elsewhere).train
    assert endings(elsewhere) == {"blocks", "index"}
    return split, contents(elsewhere)


@pytest.fixture
def watched(monkeypatch):
    """Call functions with every block that imports are about to write."""
    seen = []
    record_batches = streamed.record_batches

    def watching(*arguments):
        for batch in record_batches(*arguments):
            for look in seen:
                look(batch)
            yield batch

    monkeypatch.setattr(streamed, "record_batches", watching)
    return seen


@pytest.fixture
def allowing(watched):
    """Kill imports after a number of blocks."""
    left = iter(())

    def allow(most, kill=kill):
        nonlocal left
        left = iter(range(most))
        watched[:] = [lambda batch: next(left, None) is None and kill()]

    return allow


def killed_import(source, stream, allowing, blocks):
    """Import so many blocks and no more; let the next import go to its end."""
    allowing(blocks)
    with pytest.raises(Killed):
        load_data(source, cache=stream)
    allowing(10**6)


def begun_at(caplog):
    """Return the samples at which imports were resumed."""
    said = [record.getMessage() for record in caplog.records]
    return [int(line.split()[-1]) for line in said if line.startswith("going on with the import of")]


@everywhere
def test_an_import_killed_again_and_again_leaves_the_same_files(source, stream, undisturbed, allowing, caplog):
    whole, files = undisturbed
    assert sum(".blocks" in name and "-train-" in name for name in files) >= 3
    again = None
    kills = 0
    while again is None and kills < 60:
        allowing(6)
        try:
            again = load_data(source, cache=stream).train
        except Killed:
            kills += 1
            assert not any(name.endswith(".tmp") for name in contents(stream))
    assert 3 <= kills < 60
    starts = begun_at(caplog)
    assert len(starts) >= 2 and all(0 < start < N for start in starts)
    assert str(stream._replace(name="")) in caplog.text
    assert contents(stream) == files
    same(whole, again)
    assert (again.ids is None) == (not source.startswith("table"))
    assert again.ids is None or again.ids.tolist() == [7 * i for i in range(N)]


def test_a_kill_between_the_last_part_and_the_index(source, stream, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(streamed, "write_columns", lambda *_: kill())
        with pytest.raises(Killed):
            load_data(source, cache=stream)
    assert "index" not in endings(stream)
    load_data(source, cache=stream)
    assert contents(stream) == undisturbed[1]


@in_both_kinds
def test_stored_parts_are_not_read_again(source, stream, tmp_path, allowing, caplog, monkeypatch):
    killed_import(source, stream, allowing, 7)
    read = set()
    batches = image_files.RowGroup.batches
    monkeypatch.setattr(image_files.RowGroup, "batches", lambda group: read.add(group.file) or batches(group))
    load_data(source, cache=stream)
    (start,) = begun_at(caplog)
    assert start % FILE and start > FILE
    train = sorted((tmp_path / "data").glob("train*"))
    assert sorted(file for file in read if file in train) == train[start // FILE :]


@in_both_kinds
def test_a_killed_process(source, stream, tmp_path, undisturbed, allowing):
    def run():
        allowing(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
        load_data(source, cache=stream)

    assert Process(run, tmp_path).end().code == -signal.SIGKILL
    assert endings(stream) == {"blocks", "part", "tmp"}
    load_data(source, cache=stream)
    assert contents(stream) == undisturbed[1]


@in_both_kinds
@pytest.mark.parametrize("blocks", [1, 5, 9, 13])
def test_colour_after_grey(source, stream, tmp_path, request, allowing, blocks):
    pictures(tmp_path / "data", colour_from=100)
    whole, files = request.getfixturevalue("undisturbed")
    assert whole.shape == (3, 6, 5)
    killed_import(source, stream, allowing, blocks)
    killed_import(source, stream, allowing, 3)
    same(whole, load_data(source, cache=stream).train)
    assert contents(stream) == files


# Concurrent imports


@in_both_places
def test_two_concurrent_imports(source, stream, undisturbed, monkeypatch):
    whole, files = undisturbed
    in_step = threading.Barrier(2, timeout=15)
    write = streamed.write_note

    def together(*arguments):
        in_step.wait()
        write(*arguments)

    monkeypatch.setattr(streamed, "write_note", together)
    with ThreadPoolExecutor(2) as pool:
        loaded = [pool.submit(load_data, source, cache=stream) for _ in range(2)]
        for each in loaded:
            same(whole, each.result().train)
    assert contents(stream) == files


@pytest.fixture
def late(source, stream, watched):
    """An import of another thread that pauses after its fourth block, until an event; its blocks so far."""
    reached, event = threading.Event(), threading.Event()
    written = []

    def pause(batch):
        if threading.current_thread().name.startswith("waiting"):
            written.append(batch)
            if len(written) == 4:
                reached.set()
                assert event.wait(60)

    watched.append(pause)
    with ThreadPoolExecutor(1, "waiting") as pool:
        late = pool.submit(load_data, source, cache=stream)
        assert reached.wait(60)
        yield late, event, written


@in_both_places
def test_a_late_writer_stops_and_disturbs_no_reader(source, stream, undisturbed, late):
    whole, files = undisturbed
    late, event, written = late
    split = load_data(source, cache=stream).train
    numbers = inodes(stream)
    split.batch(torch.arange(N // 2))
    event.set()
    same(whole, late.result().train)
    same(whole, split)
    assert inodes(stream) == numbers  # a file opened on another machine stays valid
    assert contents(stream) == files
    assert len(written) < sum(len(split.blocks.of.unique()) for split in late.result())


def inodes(stream):
    system, root = opened(stream.address)
    if system.type_name != "local":
        return None
    return {name: os.stat(root + name).st_ino for name in contents(stream)}


# Damage


def change(folder):
    with next(folder.glob("train*")).open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("lost", [False, True])
def test_a_source_that_changes_leaves_nothing(source, stream, tmp_path, monkeypatch, lost):
    write = streamed.write_note
    notes = []

    def changing(*arguments):
        write(*arguments)
        notes.append(arguments)
        if len(notes) == 2:
            change(tmp_path / "data")
            if lost:
                raise UserError("no such row")

    monkeypatch.setattr(streamed, "write_note", changing)
    with pytest.raises(UserError, match="changed while it was imported"):
        load_data(source, cache=stream)
    assert len(notes) >= 2 and not contents(stream)


def test_a_complete_store_stays_when_the_source_changes(source, stream, tmp_path, late):
    late, event, _ = late
    split = load_data(source, cache=stream).train
    files = contents(stream)
    change(tmp_path / "data")
    event.set()
    with pytest.raises(UserError, match="changed while it was imported"):
        late.result()
    assert contents(stream) == files
    split.batch(torch.arange(N))


def files_in(tmp_path, ending):
    return sorted((tmp_path / "stores").glob(f"data-train-*/*{ending}"))


def shorten(file, by):
    file.write_bytes(file.read_bytes()[:-by])


@pytest.mark.parametrize(
    ("damage", "problem"), [(Path.unlink, "missing"), (lambda file: shorten(file, 9), r"\d+, and should be \d+ bytes")]
)
def test_a_part_that_is_missing_or_short_is_built_again(source, stream, tmp_path, undisturbed, caplog, damage, problem):
    load_data(source, cache=stream)
    damage(files_in(tmp_path, ".blocks")[1])
    same(undisturbed[0], load_data(source, cache=stream).train)
    assert re.search(rf"damaged and is built again: its file 00001-\w+.blocks is {problem}", caplog.text)
    assert contents(stream) == undisturbed[1]


@pytest.mark.parametrize(
    ("ending", "damage"),
    [
        (".blocks", lambda file: shorten(file, 1)),
        (".blocks", Path.unlink),
        (".part", Path.unlink),
        (".part", lambda file: shorten(file, 20)),
    ],
)
def test_an_import_resumes_from_intact_parts(source, stream, tmp_path, undisturbed, allowing, caplog, ending, damage):
    files = undisturbed[1]
    killed_import(source, stream, allowing, 13)
    _, second, _ = files_in(tmp_path, ending)
    damage(second)
    load_data(source, cache=stream)
    index = next(content for name, content in files.items() if "-train-" in name and name.endswith("index"))
    first, *_ = json.loads(pa.ipc.open_file(index[:-DIGEST]).schema.metadata[b"parts"])
    assert begun_at(caplog) == [sum(first["sizes"])]
    assert contents(stream) == files


@in_both_kinds
def test_an_image_of_another_size_after_stored_parts(source, stream, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(streamed, "PART_BYTES", 1)
    others = [samples.encode(image) for image in samples.pixels(FILE, 8, 8)]
    samples.write_parquet(tmp_path / "data" / "train-100.parquet", others, LABELS[100:])
    for _ in range(2):
        with pytest.raises(UserError, match="several sizes, such as 6×5 and 8×8"):
            load_data(source, cache=stream)
    assert begun_at(caplog) == [96]  # the block before it was not yet written


@in_both_kinds
def test_parts_that_another_process_wrote_meanwhile_stay(source, stream, undisturbed, allowing, monkeypatch):
    killed_import(source, stream, allowing, 8)
    theirs = {name: number for name, number in inodes(stream).items() if name.endswith(".blocks")}
    monkeypatch.setattr(images, "begun_header", lambda target: None)
    monkeypatch.setattr(streamed, "_notes", lambda *arguments: [])
    load_data(source, cache=stream)
    assert contents(stream) == undisturbed[1]
    assert theirs and theirs.items() <= inodes(stream).items()  # its readers go on


@in_both_kinds
@pytest.mark.parametrize("theirs", [1000, 3500])
def test_parts_of_two_versions_are_not_mixed(source, stream, tmp_path, undisturbed, allowing, monkeypatch, theirs):
    other = stream._replace(address=f"{tmp_path}/theirs")
    for each, size in ((stream, 2000), (other, theirs)):
        monkeypatch.setattr(streamed, "PART_BYTES", size)
        killed_import(source, each, allowing, 11)
    shutil.copytree(other.address, stream.address, dirs_exist_ok=True)
    again = load_data(source, cache=stream).train
    assert len(again) == N
    same(undisturbed[0], again)


@pytest.mark.parametrize("source", ["table"], indirect=True)
def test_a_damaged_index_is_built_again(source, stream, tmp_path, caplog):
    load_data(source, cache=stream)
    (index,) = files_in(tmp_path, "index")
    whole = index.read_bytes()
    flipped = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(0, len(whole), 197)]
    truncated = [whole[:end] for end in range(0, len(whole), len(whole) // 9)]
    for content in flipped + truncated:
        caplog.clear()
        index.write_bytes(content)
        load_data(source, cache=stream)
        assert index.read_bytes() == whole
        assert "is damaged and is built again: its file index is damaged" in caplog.text

"""Imports of streamed stores: interrupted, concurrent, of changing files. All leave the same files, bit for bit."""

import json
import os
import re
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

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
from raypkg.data.sources import classics, image_files, libsvm, table, text
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
    for module in (classics, libsvm, table, text):
        monkeypatch.setattr(module, "BLOCK", 8)


class Killed(BaseException):
    """Ends an import as Ctrl-C does."""


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


@pytest.fixture
def source(request, tmp_path, monkeypatch):
    if request.param.endswith("encoded"):
        monkeypatch.setattr(images, "DECODED_BYTES", 0)
    monkeypatch.setenv("EFFRAY_CACHE", str(tmp_path / "torchvision"))
    return prepared(request.param.split(",")[0], tmp_path / "data", monkeypatch)


def prepared(name, folder, monkeypatch):
    monkeypatch.setattr("contracts.test_datasets.LABELS", LABELS)
    return pictures(folder) if name == "parquet" else PREPARE[name](folder, monkeypatch)


@pytest.fixture(params=["pixels", "encoded"])
def kind(request, monkeypatch):
    if request.param == "encoded":
        monkeypatch.setattr(images, "DECODED_BYTES", 0)
    return request.param


@pytest.fixture
def stream(request, tmp_path):
    """Location of a disturbed import."""
    address = str(tmp_path / "stores")
    if request.param == "bucket":
        address = request.getfixturevalue("bucket")("stores")
    return Stream(address, 4, tmp_path / "copies")


@pytest.fixture
def local(tmp_path):
    return Stream(str(tmp_path / "stores"), 4, tmp_path / "copies")


def contents(stream):
    """Return the content of every file in a store."""
    system, root = opened(stream.address)
    entries = system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    files = [entry.path for entry in entries if entry.type == fs.FileType.File]
    return {path.removeprefix(root): system.open_input_file(path).read() for path in files}


def endings(stream, split="train"):
    return sorted(re.split(r"[./]", name)[-1] for name in contents(stream) if f"-{split}-" in name)


@pytest.fixture
def undisturbed(tmp_path):
    """Import a source elsewhere; return it and its files."""

    def load(source):
        elsewhere = Stream(str(tmp_path / "undisturbed"), 4, tmp_path / "copies")
        split = load_data(source, cache=elsewhere).train
        assert set(endings(elsewhere)) == {"blocks", "index"}
        return split, contents(elsewhere)

    return load


@pytest.fixture
def allowing(monkeypatch):
    """Kill imports after a number of blocks."""

    def allow(most, kill):
        left = [most]
        record_batches = original

        def counted(*arguments):
            for batch in record_batches(*arguments):
                left[0] -= 1
                if left[0] < 0:
                    kill()
                yield batch

        monkeypatch.setattr(streamed, "record_batches", counted)

    original = streamed.record_batches
    yield allow


def kill():
    raise Killed


def killed_import(source, stream, allowing, blocks):
    """Import so many blocks and no more; let the next import go to its end."""
    allowing(blocks, kill)
    with pytest.raises(Killed):
        load_data(source, cache=stream)
    allowing(10**6, kill)


def begun_at(caplog):
    """Return the samples at which imports were resumed."""
    said = [record.getMessage() for record in caplog.records]
    return [int(line.split()[-1]) for line in said if line.startswith("going on with the import of")]


@everywhere
def test_an_import_killed_again_and_again_leaves_the_same_files(source, stream, undisturbed, allowing, caplog):
    whole, files = undisturbed(source)
    assert sum(".blocks" in name and "-train-" in name for name in files) >= 3
    again = None
    kills = 0
    while again is None and kills < 60:
        allowing(6, kill)
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
    if again.ids is not None:
        assert again.ids.tolist() == [7 * i for i in range(N)]


def test_a_kill_between_the_last_part_and_the_index(local, tmp_path, undisturbed, monkeypatch):
    source = pictures(tmp_path / "data")
    _, files = undisturbed(source)
    with monkeypatch.context() as patch:
        patch.setattr(streamed, "write_columns", lambda *_: kill())
        with pytest.raises(Killed):
            load_data(source, cache=local)
    assert "index" not in endings(local)
    load_data(source, cache=local)
    assert contents(local) == files


def test_stored_parts_are_not_read_again(local, tmp_path, allowing, caplog, monkeypatch, kind):
    source = pictures(tmp_path / "data")
    killed_import(source, local, allowing, 7)
    read = set()
    batches = image_files.RowGroup.batches
    monkeypatch.setattr(image_files.RowGroup, "batches", lambda group: read.add(group.file) or batches(group))
    load_data(source, cache=local)
    (start,) = begun_at(caplog)
    assert start % FILE and start > FILE
    train = sorted((tmp_path / "data").glob("train*"))
    assert sorted(file for file in read if file in train) == train[start // FILE :]


def test_a_killed_process(local, tmp_path, undisturbed, allowing, kind):
    source = pictures(tmp_path / "data")
    _, files = undisturbed(source)

    def run():
        images.decoding_threads.cache_clear()  # a fork has none of the threads
        allowing(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
        load_data(source, cache=local)

    assert Process(run, tmp_path).end().code == -signal.SIGKILL
    assert set(endings(local)) == {"blocks", "part", "tmp"}
    load_data(source, cache=local)
    assert contents(local) == files


@pytest.mark.parametrize("blocks", [1, 5, 9, 13])
def test_colour_after_grey(local, tmp_path, undisturbed, allowing, kind, blocks):
    source = pictures(tmp_path / "data", colour_from=100)
    whole, files = undisturbed(source)
    assert whole.shape == (3, 6, 5)
    killed_import(source, local, allowing, blocks)
    killed_import(source, local, allowing, 3)
    same(whole, load_data(source, cache=local).train)
    assert contents(local) == files


# Concurrent imports


@in_both_places
def test_two_concurrent_imports(source, stream, undisturbed, monkeypatch):
    whole, files = undisturbed(source)
    in_step = threading.Barrier(2, timeout=15)
    write = streamed.write_note

    def together(*arguments):
        in_step.wait()
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(streamed, "write_note", together)
        with ThreadPoolExecutor(2) as pool:
            loaded = [pool.submit(load_data, source, cache=stream) for _ in range(2)]
            failed = [each.exception() for each in loaded]
            assert failed == [None, None]
            for each in loaded:
                same(whole, each.result().train)
    assert contents(stream) == files


@pytest.fixture
def waiting(monkeypatch):
    """Pause imports in threads of this name after their fourth block, until an event."""
    reached, event = threading.Event(), threading.Event()
    written = []
    record_batches = streamed.record_batches

    def counted(*arguments):
        for batch in record_batches(*arguments):
            if threading.current_thread().name.startswith("waiting"):
                written.append(batch)
                if len(written) == 4:
                    reached.set()
                    assert event.wait(60)
            yield batch

    monkeypatch.setattr(streamed, "record_batches", counted)
    return reached, event, written


@in_both_places
def test_a_late_writer_stops_and_disturbs_no_reader(source, stream, undisturbed, waiting):
    whole, files = undisturbed(source)
    reached, event, written = waiting
    with ThreadPoolExecutor(1, "waiting") as pool:
        late = pool.submit(load_data, source, cache=stream)
        assert reached.wait(60)
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
def test_a_source_that_changes_leaves_nothing(local, tmp_path, monkeypatch, lost):
    source = pictures(tmp_path / "data")
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
        load_data(source, cache=local)
    assert len(notes) >= 2 and not contents(local)


def test_a_complete_store_stays_when_the_source_changes(local, tmp_path, waiting):
    source = pictures(tmp_path / "data")
    reached, event, _ = waiting
    with ThreadPoolExecutor(1, "waiting") as pool:
        late = pool.submit(load_data, source, cache=local)
        assert reached.wait(60)
        split = load_data(source, cache=local).train
        files = contents(local)
        change(tmp_path / "data")
        event.set()
        with pytest.raises(UserError, match="changed while it was imported"):
            late.result()
    assert contents(local) == files
    split.batch(torch.arange(N))


def parts_in(tmp_path, ending=".blocks"):
    return sorted((tmp_path / "stores").glob(f"data-train-*/*{ending}"))


def test_a_part_that_is_missing(local, tmp_path, undisturbed, caplog):
    source = pictures(tmp_path / "data")
    _, files = undisturbed(source)
    load_data(source, cache=local)
    next(path for path in (tmp_path / "stores").glob("*-train-*/*.blocks") if path.name.startswith("00001")).unlink()
    load_data(source, cache=local)
    assert re.search(r"damaged and is built again: its file 00001-\w+.blocks is missing", caplog.text)
    assert contents(local) == files


@pytest.mark.parametrize("how", ["short", "missing", "without its note", "its note damaged"])
def test_an_import_resumes_from_intact_parts(local, tmp_path, undisturbed, allowing, caplog, how):
    source = pictures(tmp_path / "data")
    _, files = undisturbed(source)
    killed_import(source, local, allowing, 13)
    assert len(parts_in(tmp_path)) == 3
    second, note = parts_in(tmp_path)[1], parts_in(tmp_path, ".part")[1]
    match how:
        case "short":
            second.write_bytes(second.read_bytes()[:-1])
        case "missing":
            second.unlink()
        case "without its note":
            note.unlink()
        case _:
            note.write_bytes(note.read_bytes()[:-20])
    load_data(source, cache=local)
    index = next(content for name, content in files.items() if "-train-" in name and name.endswith("index"))
    first, *_ = json.loads(pa.ipc.open_file(index[:-DIGEST]).schema.metadata[b"parts"])
    assert begun_at(caplog) == [sum(first["sizes"])]
    assert contents(local) == files


def test_an_image_of_another_size_after_stored_parts(local, tmp_path, monkeypatch, kind, caplog):
    monkeypatch.setattr(streamed, "PART_BYTES", 1)
    source = pictures(tmp_path / "data")
    others = [samples.encode(image) for image in samples.pixels(FILE, 8, 8)]
    samples.write_parquet(tmp_path / "data" / "train-100.parquet", others, LABELS[100:])
    for _ in range(2):
        with pytest.raises(UserError, match="several sizes, such as 6×5 and 8×8"):
            load_data(source, cache=local)
    assert begun_at(caplog) == [96]  # the block before it was not yet written


def test_parts_that_another_process_wrote_meanwhile_stay(local, tmp_path, undisturbed, allowing, monkeypatch, kind):
    source = pictures(tmp_path / "data")
    _, files = undisturbed(source)
    killed_import(source, local, allowing, 8)
    theirs = {name: number for name, number in inodes(local).items() if name.endswith(".blocks")}
    monkeypatch.setattr(images, "begun_header", lambda target: None)
    monkeypatch.setattr(streamed, "_notes", lambda *arguments: [])
    load_data(source, cache=local)
    assert contents(local) == files
    assert theirs and theirs.items() <= inodes(local).items()  # its readers go on


@pytest.mark.parametrize("theirs", [1000, 3500])
def test_parts_of_two_versions_are_not_mixed(local, tmp_path, undisturbed, allowing, monkeypatch, kind, theirs):
    source = pictures(tmp_path / "data")
    whole, _ = undisturbed(source)
    other = local._replace(address=f"{tmp_path}/theirs")
    for stream, size in ((local, 2000), (other, theirs)):
        monkeypatch.setattr(streamed, "PART_BYTES", size)
        killed_import(source, stream, allowing, 11)
    shutil.copytree(other.address, local.address, dirs_exist_ok=True)
    again = load_data(source, cache=local).train
    assert len(again) == N
    same(whole, again)


def test_a_damaged_index_is_built_again(local, tmp_path, monkeypatch, caplog):
    source = prepared("table", tmp_path / "data", monkeypatch)
    load_data(source, cache=local)
    (index,) = (tmp_path / "stores").glob("*-train-*/index")
    whole = index.read_bytes()
    flipped = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(0, len(whole), 97)]
    truncated = [whole[:end] for end in range(0, len(whole), len(whole) // 20)]
    for content in flipped + truncated:
        caplog.clear()
        index.write_bytes(content)
        load_data(source, cache=local)
        assert index.read_bytes() == whole
        assert "is damaged and is built again: its file index is damaged" in caplog.text

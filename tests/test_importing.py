"""Imports of stores that are read by blocks: killed, at once, of files that change. All leave the very same files."""

import json
import os
import re
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs

import samples
from contracts.test_datasets import from_torchvision
from forked import Process
from raypkg.core.address import opened
from raypkg.core.errors import UserError
from raypkg.data import load_data
from raypkg.data.sources import classics, image_folder, libsvm, parquet, table, text
from raypkg.data.store import images, parts
from raypkg.data.store.cache import beginning_at
from raypkg.data.store.parts import DIGEST, Stream, appearing
from test_object_sources import same

N = 120
LABELS = np.arange(N) * 3 // N
FILE = 20  # images of a parquet file, which are read as 8, 8 and 4


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A store has several parts, these several blocks, and of four encoded images one gives the statistics."""
    monkeypatch.setattr(parts, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(parts, "PART_BYTES", 2000)
    monkeypatch.setattr(images, "SAMPLED", 40)
    for module in (image_folder, parquet):
        monkeypatch.setattr(module, "READ_AT_ONCE", 8)
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


def from_folder(folder):
    for split in ("train", "val"):
        samples.write_folder(folder / split, samples.pixels(N), LABELS)
    return f"folder:{folder}"


def from_table(folder):
    folder.mkdir()
    columns = {f"x{i}": np.random.default_rng(i).normal(size=N) for i in range(20)}
    rows = pa.table({**columns, "id": np.arange(N) * 7, "label": LABELS})
    for split in ("train", "test"):
        pq.write_table(rows.replace_schema_metadata({"effray": '{"id": "id"}'}), folder / f"{split}.parquet")
    return f"table:{folder}"


def from_libsvm(folder):
    folder.mkdir()
    for split in ("train", "test"):
        with (folder / f"{split}.libsvm").open("w") as file:
            for i, y in enumerate(LABELS):
                entries = [f"{1 + column}:{i + 0.5}" for column in range(9 + i % 3)]
                print(y, *entries, file=file)
    return f"libsvm:{folder}"


def from_text(folder):
    pytest.importorskip("tokenizers")
    folder.mkdir()
    texts = [f"where is cat {i}, who ran on {i * i} dogs" for i in range(N)]
    for split in ("train", "test"):
        pq.write_table(pa.table({"text": texts, "label": LABELS}), folder / f"{split}-0.parquet")
    return f"text:{folder}"


SOURCES = {
    "parquet": pictures,
    "parquet, encoded": pictures,
    "folder": from_folder,
    "folder, encoded": from_folder,
    "table": from_table,
    "libsvm": from_libsvm,
    "text": from_text,
    "cifar10": None,
}
PLACES = [*((name, "folder") for name in SOURCES), ("parquet, encoded", "bucket"), ("table", "bucket")]
everywhere = pytest.mark.parametrize(("source", "stream"), PLACES, indirect=True)


@pytest.fixture(params=[*SOURCES])
def source(request, tmp_path, monkeypatch):
    if request.param.endswith("encoded"):
        monkeypatch.setattr(images, "DECODED_BYTES", 0)
    if request.param == "cifar10":
        monkeypatch.setenv("EFFRAY_CACHE", str(tmp_path / "torchvision"))
        monkeypatch.setattr("contracts.test_datasets.LABELS", LABELS)
        return from_torchvision("CIFAR10", tmp_path / "data", monkeypatch)
    return SOURCES[request.param](tmp_path / "data")


@pytest.fixture(params=["pixels", "encoded"])
def kind(request, monkeypatch):
    if request.param == "encoded":
        monkeypatch.setattr(images, "DECODED_BYTES", 0)
    return request.param


@pytest.fixture(params=["folder", "bucket"])
def stream(request, tmp_path):
    """Where an import is disturbed."""
    address = str(tmp_path / "stores")
    if request.param == "bucket":
        address = request.getfixturevalue("bucket")("stores")
    return Stream(address, 4, tmp_path / "copies")


@pytest.fixture
def local(tmp_path):
    return Stream(str(tmp_path / "stores"), 4, tmp_path / "copies")


def contents(stream):
    """Return every file that lies there."""
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
    """Let imports write so many blocks, then kill them."""

    def allow(most, kill):
        left = [most]
        record_batches = original

        def counted(*arguments):
            for batch in record_batches(*arguments):
                left[0] -= 1
                if left[0] < 0:
                    kill()
                yield batch

        monkeypatch.setattr(parts, "record_batches", counted)

    original = parts.record_batches
    yield allow


def kill():
    raise Killed


def never():
    raise AssertionError


def begun_at(caplog):
    """Return the samples at which imports went on."""
    said = [record.getMessage() for record in caplog.records]
    return [int(line.split()[-1]) for line in said if line.startswith("going on with the import of")]


@everywhere
def test_an_import_goes_on_and_leaves_the_same_files(source, stream, undisturbed, allowing, caplog):
    whole, files = undisturbed(source)
    assert sum(".blocks" in name and "-train-" in name for name in files) >= 3
    allowing(4, kill)
    with pytest.raises(Killed):
        load_data(source, cache=stream)
    assert endings(stream).count("blocks") == endings(stream).count("part") >= 1
    assert set(endings(stream)) == {"blocks", "part"}
    allowing(10**6, never)
    again = load_data(source, cache=stream).train
    (start,) = begun_at(caplog)
    assert 0 < start < N
    assert str(stream._replace(name="")) in caplog.text
    assert contents(stream) == files
    same(whole, again)
    assert (again.ids is None) == (not source.startswith("table"))
    if again.ids is not None:
        assert again.ids.tolist() == [7 * i for i in range(N)]


def test_one_that_is_killed_again_and_again_comes_to_its_end(source, local, undisturbed, allowing):
    _, files = undisturbed(source)
    kills = 0
    while kills < 60:
        allowing(4, kill)
        try:
            load_data(source, cache=local)
            break
        except Killed:
            kills += 1
            assert not any(name.endswith(".tmp") for name in contents(local))
    assert kills >= 3 and contents(local) == files


def test_one_that_is_killed_when_all_parts_are_there(source, local, undisturbed, monkeypatch):
    _, files = undisturbed(source)
    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_columns", lambda *_: kill())
        with pytest.raises(Killed):
            load_data(source, cache=local)
    assert "index" not in endings(local)
    load_data(source, cache=local)
    assert contents(local) == files


@pytest.mark.parametrize("made", [pictures, from_folder])
def test_what_the_parts_hold_is_not_read_again(made, local, tmp_path, allowing, caplog, monkeypatch, kind):
    source = made(tmp_path / "data")
    allowing(7, kill)
    with pytest.raises(Killed):
        load_data(source, cache=local)
    read = set()
    batches, content = parquet.RowGroup.batches, image_folder._content
    monkeypatch.setattr(
        parquet.RowGroup, "batches", lambda group, columns: read.add(group.file) or batches(group, columns)
    )
    monkeypatch.setattr(image_folder, "_content", lambda file: read.add(file) or content(file))
    allowing(10**6, never)
    load_data(source, cache=local)
    (start,) = begun_at(caplog)
    assert start % FILE and start > FILE
    train = sorted(file for file in (tmp_path / "data").rglob("*.p*") if "train" in str(file))
    held = N // len(train)  # samples in a file
    assert sorted(file for file in read if file in train) == train[start // held :]


def test_a_process_that_was_killed(local, tmp_path, undisturbed, allowing, kind):
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


@pytest.mark.parametrize("blocks", [1, 3, 5, 7, 9, 11, 13])
def test_colour_after_grey(local, tmp_path, undisturbed, allowing, kind, blocks):
    source = pictures(tmp_path / "data", colour_from=100)
    whole, files = undisturbed(source)
    assert whole.shape == (3, 6, 5)
    for _ in range(2):
        allowing(blocks, kill)
        with pytest.raises(Killed):
            load_data(source, cache=local)
        blocks = 3
    allowing(10**6, never)
    same(whole, load_data(source, cache=local).train)
    assert contents(local) == files


def test_colour_that_was_found_is_not_looked_for_again(local, tmp_path, monkeypatch, kind, caplog):
    source = pictures(tmp_path / "data", colour_from=100)
    shapes = []
    write = parts.write_note

    def noted(stream, note):
        shapes.append(note.header.shape[0])
        write(stream, note)
        if shapes[0] == 1 and shapes[-2:] == [3, 3]:
            kill()

    monkeypatch.setattr(parts, "write_note", noted)
    with pytest.raises(Killed):
        load_data(source, cache=local)
    shapes.clear()
    load_data(source, cache=local)
    assert set(shapes) == {3} and len(begun_at(caplog)) == 1


# Two at once


@everywhere
def test_two_at_once(source, stream, undisturbed, monkeypatch):
    whole, files = undisturbed(source)
    in_step = threading.Barrier(2, timeout=15)
    write = parts.write_note

    def together(*arguments):
        in_step.wait()
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_note", together)
        with ThreadPoolExecutor(2) as pool:
            loaded = [pool.submit(load_data, source, cache=stream) for _ in range(2)]
            failed = [each.exception() for each in loaded]
            assert failed == [None, None]
            for each in loaded:
                same(whole, each.result().train)
    assert contents(stream) == files


@pytest.fixture
def waiting(monkeypatch):
    """Let the imports of a thread of this name stop after their fourth block, until an event."""
    reached, event = threading.Event(), threading.Event()
    written = []
    record_batches = parts.record_batches

    def counted(*arguments):
        for batch in record_batches(*arguments):
            if threading.current_thread().name.startswith("waiting"):
                written.append(batch)
                if len(written) == 4:
                    reached.set()
                    assert event.wait(60)
            yield batch

    monkeypatch.setattr(parts, "record_batches", counted)
    return reached, event, written


def test_a_reader_is_not_disturbed_by_a_writer_who_is_late(source, local, undisturbed, waiting):
    whole, files = undisturbed(source)
    reached, event, written = waiting
    with ThreadPoolExecutor(1, "waiting") as pool:
        late = pool.submit(load_data, source, cache=local)
        assert reached.wait(60)
        split = load_data(source, cache=local).train
        numbers = inodes(local)
        split.batch(torch.arange(N // 2))
        event.set()
        same(whole, late.result().train)
    same(whole, split)
    assert inodes(local) == numbers  # whoever has a file open on another machine keeps it
    assert contents(local) == files
    assert len(written) < sum(len(split.blocks.of.unique()) for split in late.result())  # it did not go on to the end


def test_a_writer_who_is_late_stops_at_the_next_part(local, tmp_path, undisturbed, monkeypatch, kind):
    source = pictures(tmp_path / "data")
    whole, files = undisturbed(source)
    reached, event = threading.Event(), threading.Event()
    noted = []
    write = parts.write_note

    def waiting_between_parts(*arguments):
        write(*arguments)
        if threading.current_thread().name.startswith("waiting"):
            noted.append(arguments)
            reached.set()
            assert event.wait(60)

    monkeypatch.setattr(parts, "write_note", waiting_between_parts)
    with ThreadPoolExecutor(1, "waiting") as pool:
        late = pool.submit(load_data, source, cache=local)
        assert reached.wait(60)
        load_data(source, cache=local)
        before = inodes(local)
        event.set()
        same(whole, late.result().train)
    assert len(noted) == 1
    assert inodes(local) == before and contents(local) == files


def test_a_file_that_is_there_stays(local, tmp_path):
    stream = local._replace(name="a")
    (tmp_path / "stores" / "a").mkdir(parents=True)
    for content, is_there, kept in ((b"123", False, b"123"), (b"456", True, b"123"), (b"789", False, b"789")):
        before = inodes(local)
        with appearing(stream, lambda: "part", lambda there=is_there: there) as sink:
            sink.write(content)
        assert contents(local) == {"/a/part": kept}
        assert (inodes(local) == before) == is_there


def inodes(stream):
    _, root = opened(stream.address)
    return {name: os.stat(root + name).st_ino for name in contents(stream)}


def test_a_writer_who_is_late_stops_in_a_bucket(bucket, tmp_path, undisturbed, waiting):
    source = pictures(tmp_path / "data")
    whole, files = undisturbed(source)
    stream = Stream(bucket("stores"), 4, tmp_path / "copies")
    reached, event, written = waiting
    with ThreadPoolExecutor(1, "waiting") as pool:
        late = pool.submit(load_data, source, cache=stream)
        assert reached.wait(60)
        split = load_data(source, cache=stream).train
        event.set()
        same(whole, late.result().train)
    same(whole, split)
    assert contents(stream) == files
    assert len(written) < len(split.blocks.of.unique())


# What goes wrong


def change(folder):
    with next(folder.glob("train*")).open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("lost", [False, True])
def test_a_source_that_changes_leaves_nothing(local, tmp_path, monkeypatch, lost):
    source = pictures(tmp_path / "data")
    write = parts.write_note
    notes = []

    def changing(*arguments):
        write(*arguments)
        notes.append(arguments)
        if len(notes) == 2:
            change(tmp_path / "data")
            if lost:
                raise UserError("no such row")

    monkeypatch.setattr(parts, "write_note", changing)
    with pytest.raises(UserError, match="changed while it was imported"):
        load_data(source, cache=local)
    assert len(notes) >= 2 and not contents(local)


def test_what_another_has_finished_stays_when_the_source_changes(local, tmp_path, waiting):
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


def test_a_part_that_is_missing(source, local, tmp_path, undisturbed, caplog):
    _, files = undisturbed(source)
    load_data(source, cache=local)
    next(path for path in (tmp_path / "stores").glob("*-train-*/*.blocks") if path.name.startswith("00001")).unlink()
    load_data(source, cache=local)
    assert re.search(r"damaged and is built again: its file 00001-\w+.blocks is missing", caplog.text)
    assert contents(local) == files


def test_one_whose_files_somebody_deletes_is_told(local, tmp_path, monkeypatch):
    source = pictures(tmp_path / "data")
    write = parts.write_columns

    def deleted(*arguments):
        write(*arguments)
        for path in parts_in(tmp_path):
            path.unlink()

    monkeypatch.setattr(parts, "write_columns", deleted)
    with pytest.raises(UserError, match=r"cannot build the store .*have just been deleted"):
        load_data(source, cache=local)


@pytest.mark.parametrize("how", ["short", "missing", "without its note", "its note damaged"])
def test_an_import_goes_on_from_the_parts_that_are_whole(local, tmp_path, undisturbed, allowing, caplog, how):
    source = pictures(tmp_path / "data")
    _, files = undisturbed(source)
    allowing(13, kill)
    with pytest.raises(Killed):
        load_data(source, cache=local)
    allowing(10**6, never)
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


def test_a_part_must_end_with_a_block_of_the_source():
    assert list(beginning_at(3, ["abc", "de", "f"], len)) == ["de", "f"]
    with pytest.raises(UserError, match="ended within a block"):
        list(beginning_at(4, ["abc", "de", "f"], len))


def test_an_image_of_another_size_is_found_behind_what_is_kept(local, tmp_path, monkeypatch, kind, caplog):
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    source = pictures(tmp_path / "data")
    others = [samples.encode(image) for image in samples.pixels(FILE, 8, 8)]
    samples.write_parquet(tmp_path / "data" / "train-100.parquet", others, LABELS[100:])
    for _ in range(2):
        with pytest.raises(UserError, match="several sizes, such as 6×5 and 8×8"):
            load_data(source, cache=local)
    assert begun_at(caplog) == [100]


def test_parts_that_another_wrote_since_the_first_image_was_looked_at(
    local, tmp_path, undisturbed, allowing, monkeypatch, kind
):
    source = pictures(tmp_path / "data")
    _, files = undisturbed(source)
    allowing(8, kill)
    with pytest.raises(Killed):
        load_data(source, cache=local)
    allowing(10**6, never)
    monkeypatch.setattr(images, "begun_header", lambda target: None)
    load_data(source, cache=local)
    assert contents(local) == files


@pytest.mark.parametrize("theirs", [1000, 2500, 3500, 4500])
def test_parts_of_two_versions_are_not_mixed(local, tmp_path, undisturbed, allowing, monkeypatch, kind, theirs):
    source = pictures(tmp_path / "data")
    whole, _ = undisturbed(source)
    other = local._replace(address=f"{tmp_path}/theirs")
    for stream, size in ((local, 2000), (other, theirs)):
        monkeypatch.setattr(parts, "PART_BYTES", size)
        allowing(11, kill)
        with pytest.raises(Killed):
            load_data(source, cache=stream)
    shutil.copytree(other.address, local.address, dirs_exist_ok=True)
    allowing(10**6, never)
    again = load_data(source, cache=local).train
    assert len(again) == N
    same(whole, again)


def test_an_index_that_ends_anywhere_is_built_again(local, tmp_path):
    source = from_table(tmp_path / "data")
    load_data(source, cache=local)
    (index,) = (tmp_path / "stores").glob("*-train-*/index")
    whole = index.read_bytes()
    for end in range(0, len(whole), len(whole) // 20):
        index.write_bytes(whole[:end])
        load_data(source, cache=local)
        assert index.read_bytes() == whole


def test_a_damaged_index_is_built_again(local, tmp_path, caplog):
    source = from_table(tmp_path / "data")
    load_data(source, cache=local)
    (index,) = (tmp_path / "stores").glob("*-train-*/index")
    whole = index.read_bytes()
    for place in range(0, len(whole), 97):
        caplog.clear()
        index.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        load_data(source, cache=local)
        assert index.read_bytes() == whole
        assert "is damaged and is built again: its file index is damaged" in caplog.text


def test_a_store_that_is_built_again_keeps_no_damaged_part(local, tmp_path, undisturbed):
    source = pictures(tmp_path / "data")
    _, files = undisturbed(source)
    load_data(source, cache=local)
    part = parts_in(tmp_path)[1]
    part.write_bytes(bytes(part.stat().st_size))
    (part.parent / "index").unlink()
    load_data(source, cache=local)
    assert contents(local) == files

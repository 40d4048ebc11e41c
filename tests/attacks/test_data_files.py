"""Data files that are damaged or ambiguous: one line that names the file and the place, and no store is left."""

import json
import os
from contextlib import contextmanager
from datetime import date
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import samples
from raypkg.core.errors import UserError
from raypkg.data import load_data

ROWS = "".join(f"{i},{i % 2}\n" for i in range(9))
GOOD = f"a,label\n{ROWS}"


@pytest.fixture
def cache(tmp_path):
    """Where stores lie, of which none may be left by data that was refused."""
    return tmp_path / "cache"


@contextmanager
def refused(cache, message):
    with pytest.raises(UserError, match=message):
        yield
    assert not [file for file in cache.glob("*") if file.suffix != ".lock"]


@pytest.fixture
def load(tmp_path, cache):
    """Load a table of text, bytes or Arrow."""

    def load(content, **options):
        file = tmp_path / ("rows.parquet" if isinstance(content, pa.Table) else "rows.csv")
        if isinstance(content, pa.Table):
            pq.write_table(content, file)
        else:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_data(f"table:{file}", options, cache=cache)

    return load


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rows.csv' cannot be read: Empty CSV file"),
        ("a,label\n", "rows.csv' has 0 rows and 1 columns besides 'label'"),
        ("1,0\n2,1\n", "unknown label column of .*rows.csv' 'label'. Allowed: 0, 1"),
        ("a,a,label\n1,2,0\n", "rows.csv' has two columns 'a' among a, a, label"),
        (GOOD + "1\n", "rows.csv' cannot be read: CSV parse error: Expected 2 columns, got 1"),
        (GOOD.encode("utf-16"), "rows.csv' cannot be read"),
        (b"a\xff,label\n1,0\n", "rows.csv' cannot be read: 'utf-8' codec can't decode byte 0xff"),
        (b"a,label\n1,\xff\n", "label column 'label' of .*rows.csv' is binary, needed are numbers or texts in UTF-8"),
        ("a,label\n1\x00,0\n", "column 'a' of .*rows.csv' is string, needed are numbers"),
        ('a,label\n1,"x\n2,0\n', "column 'label' of .*rows.csv' holds a line break in line 2"),
        ('a,label\n1,cat\n2,""\n', "column 'label' of .*rows.csv' has no value in line 3"),
    ],
)
def test_what_is_no_table(load, cache, text, message):
    with refused(cache, message):
        load(text)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("NaN", "holds NaN in line 13, needed are finite numbers"),
        ("", "has no value in line 13"),
        ("inf", "holds inf in line 13"),
        ("1e300", r"holds 1e\+300 in line 13, needed are finite numbers that float32 can hold"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_value_is_found_by_its_line(load, value, problem, end):
    text = f"a,label\n\n\n{ROWS}{value},1\n"  # the header, two empty lines and nine rows come before it
    with pytest.raises(UserError, match=f"column 'a' of .*rows.csv' {problem}"):
        load(text.replace("\n", end))


def test_texts_that_read_like_nothing_are_classes(load):
    data = load("a,label\n1,NA\n2,cat\n3,nan\n4,null\n5,NA\n", test=0.5)
    assert data.train.classes == ("NA", "cat", "nan", "null")


def column(values, kind=None):
    return pa.table({"a": pa.array(values, kind), "label": [0, 1] * (len(values) // 2)})


NO_NAMES = (
    [[1], [2]],
    [{"a": 1}, {"a": 2}],
    *(pa.array([b"a", b"b"], kind) for kind in (pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(1))),
    pa.array([1, 2], pa.timestamp("ns", "nowhere/zone")),
    pa.array([1, 2], pa.time64("ns")),  # two times that read the same
)


def noting(metadata):
    noted = metadata if isinstance(metadata, str) else json.dumps(metadata)
    return column([1, 2]).replace_schema_metadata({"effray": noted})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (column([1, 2**24 + 1]), "column 'a' of .*rows.parquet' holds 16777217, which float32 rounds"),
        (column([[1], [2]]), r"column 'a' of .* is list<.*>, needed are numbers"),
        (pa.table({"label": [0, 1]}), "has 2 rows and 0 columns besides 'label'"),
        (column([1.0, 2.0]).set_column(1, "label", [["a" * 1001, "b"]]), "label' .* longer than 1,000 bytes in row 0"),
        (noting({"classes": ["0", "1", "0"]}), "metadata 'effray' of .*': classes = .*: has two classes '0'"),
        (noting("[" * 50_000), "metadata 'effray' of .*rows.parquet': .*invalid JSON"),
        *(
            (pa.table({"a": [1.0, 2.0], "label": labels}), "label' of .* is .*, needed are numbers or texts in UTF-8")
            for labels in NO_NAMES
        ),
    ],
)
def test_columns_that_are_no_rows_of_numbers(load, cache, table, message):
    with refused(cache, message):
        load(table)


def test_integers_that_float32_holds(load):
    exact = [0, -1, 2**24, -(2**24), 2**62, -(2**63), 3 * 2**40, 2**24 - 1]
    data = load(column(exact), test=0.5)
    x = torch.cat([split.batch(range(len(split)))[0] for split in data])
    assert sorted(x.flatten().tolist()) == sorted(map(float, exact))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (pa.array([2**64 - 1, 0], pa.uint64()), ("0", "18446744073709551615")),
        (pa.array(["b", "a"]).dictionary_encode(), ("a", "b")),
        (pa.array(["b", "a"], pa.string_view()), ("a", "b")),
        (pa.array([2.0, 1.5], pa.float16()), ("1.5", "2.0")),
        ([Decimal("10"), Decimal("9")], ("9", "10")),
        ([date(2026, 1, 2), date(2025, 1, 2)], ("2025-01-02", "2026-01-02")),
        ([True, False], ("False", "True")),
    ],
)
def test_labels_of_any_kind(load, labels, classes):
    labels = pa.concat_arrays([pa.array(labels)] * 4)
    data = load(pa.table({"a": np.arange(8.0), "label": labels}), test=0.5)
    assert data.train.classes == classes


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        samples.write_folder(tmp_path / "set" / split, samples.pixels(6), np.arange(6) % 3)
    return tmp_path / "set"


@pytest.fixture
def load_folder(folder, cache):
    return lambda **options: load_data(f"folder:{folder}", options, cache=cache)


@pytest.mark.parametrize("make", [lambda file: file.symlink_to("nowhere.png"), os.mkfifo])
def test_what_is_named_like_an_image_and_is_no_file(folder, load_folder, cache, make):
    make(folder / "train" / "cat" / "new.png")
    with refused(cache, r"'.*train/cat/new.png' is no file: a link that leads nowhere"):
        load_folder()


@pytest.mark.parametrize("kind", ["table", "libsvm", "text", "parquet", "folder"])
def test_a_path_that_is_not_utf8(kind):
    with pytest.raises(UserError, match=r"path '\\udcff.csv': its name must be UTF-8"):
        load_data(f"{kind}:\udcff.csv")


REPEATED = pa.DictionaryArray.from_arrays(np.zeros(3000, np.int32), ["a" * 1000])  # 3 MB that take some bytes on disk
NUMBERS = pa.array(np.arange(3000) % 2)
VECTORS = pa.array([[0.0] * 100] * 3000, pa.list_(pa.float32(), 100))
BOMBS = {
    "numbers.parquet": ("table", pa.table({"a": np.zeros(100_000), "label": np.zeros(100_000)})),
    "vectors.parquet": ("table", pa.table({"a": VECTORS, "label": NUMBERS})),
    "names.parquet": ("table", pa.table({"a": NUMBERS, "label": REPEATED})),
    "texts.parquet": ("text", pa.table({"text": REPEATED, "label": NUMBERS})),
    "rows.csv": ("table", "a,label\n" + "1,1\n" * 300_000),
    "texts.jsonl": ("text", '{"text": "a", "label": 1}\n' * 60_000),
    "line.libsvm": ("libsvm", "1" + " " * 20_000 + "1:1\n"),
    "rows.libsvm": ("libsvm", "1 1:1\n" * 5000),
    "train.parquet": ("parquet", pa.table({"image": REPEATED.cast(pa.binary()), "label": NUMBERS})),
    "train-rows.parquet": ("parquet", pa.table({"image": [b""] * 80_000, "label": np.zeros(80_000, np.int8)})),
}


@pytest.mark.parametrize("name", BOMBS)
def test_more_than_the_limit_of_memory_is_refused_before_it_is_read(tmp_path, cache, monkeypatch, name):
    monkeypatch.setenv("EFFRAY_MEMORY", "0.001")  # GiB
    kind, content = BOMBS[name]
    file = tmp_path / name
    if isinstance(content, str):
        file.write_text(content)
    else:
        # The schema of Arrow would make dictionaries of texts; the fixed size of vectors stands in it alone.
        pq.write_table(content, file, compression="zstd", store_schema=name == "vectors.parquet")
    if kind == "parquet":
        samples.write_parquet(tmp_path / "test.parquet", [b"a"], [0])
    with refused(cache, rf"{name}'.*: 0\.\d+ GiB of memory when read, the limit is 0\.001 GiB"):
        load_data(f"{kind}:{tmp_path if kind == 'parquet' else file}", cache=cache)


def test_brackets_in_texts_are_no_nesting(tmp_path, cache):
    pytest.importorskip("tokenizers")
    rows = [{"label": i % 2, "text": f'{i} \\"{"[" * 50}'} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_data(f"text:{tmp_path}/rows.jsonl", cache=cache).train) == 16


def test_a_file_that_is_larger_than_any_image(folder, load_folder):
    with (folder / "train/cat/000.png").open("r+b") as file:
        file.truncate(5 << 30)
    with pytest.raises(UserError, match=r"image '.*000.png', one of 16 at once: 80 GiB of memory when read, the limit"):
        load_folder()


def test_unusual_names_and_links_in_a_folder(folder, load_folder):
    inner = folder / "train/cat/more.png"  # a folder that is named like an image
    inner.mkdir()
    (inner / "a.png").write_bytes(samples.encode(samples.pixels(1)[0]))
    (folder / "train/cat/up").symlink_to(folder)  # no endless way
    os.rename(folder / "train/cat/000.png", os.fsencode(folder / "train/cat") + b"/\xff.png")  # not UTF-8
    assert len(load_folder().train) == 7


def test_an_image_that_may_not_be_read(folder, load_folder, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")  # the tests may run as root, who may read everything

    monkeypatch.setattr("raypkg.data.sources.image_files.open_input", denied)
    with pytest.raises(UserError, match=r"image '.*train/cat/000.png' cannot be read: Permission denied"):
        load_folder()


def test_a_class_whose_name_is_not_utf8(folder, load_folder):
    name = os.fsencode(folder / "train") + b"/\xff"
    os.rename(folder / "train" / "cat", name)
    with pytest.raises(UserError, match=r"has the class '\\udcff', whose name is not UTF-8"):
        load_folder()

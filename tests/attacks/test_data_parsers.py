"""Texts and bytes that nobody thought of: a parser gives a right result or an error of one line, nothing else."""

import json
import warnings
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import samples
from raypkg.core.errors import UserError
from raypkg.core.settings import Dataset, RunSettings
from raypkg.data.coreset import Coreset
from raypkg.data.sources.image_files import ImageTable
from raypkg.data.sources.table import RowTable, read_sparse
from raypkg.data.split import Split
from raypkg.data.store.images import decode_all, surveyed
from raypkg.experiments.coreset_files import load_coreset, save_coreset
from raypkg.experiments.samples import Samples
from raypkg.runs.storage import Storage

fuzzed = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@contextmanager
def one_line_at_most():
    """Let pass what succeeds, and an error that a user can read; warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            yield
        except UserError as error:
            assert str(error) and "\n" not in str(error)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Return the content with a few bytes replaced, and perhaps its end missing or some bytes left out."""
    place = st.integers(0, len(content) - 1)
    changes = st.lists(st.tuples(place, st.integers(0, 255)), max_size=4)
    cut = st.none() | st.tuples(place, st.integers(1, 40))
    end = st.just(len(content)) | place

    def damage(changes, cut, end):
        broken = bytearray(content)
        for at, value in changes:
            broken[at] = value
        if cut:
            start, length = cut
            del broken[start : start + length]
        return bytes(broken[:end])

    return st.builds(damage, changes, cut, end)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed")


def encoded(text):
    return text.encode("utf-8", "surrogatepass")


def written(folder, name, content):
    file = folder / name
    file.write_bytes(content)
    return file


# A row of libsvm's form, and what is near it.
word = st.text("0123456789:.-+enaif_# \t", max_size=12)
line = st.lists(word, max_size=4).map(" ".join)
LIBSVM = b"+1 1:0.5 3:-2 # a remark\n-1 2:1e-3\n\n1.0 4:4\n-1\n0 7:1e10\n"
entry = st.tuples(st.integers(1, 50), st.floats(width=32, allow_nan=False, allow_infinity=False))
row = st.tuples(st.integers(-3, 3), st.lists(entry, unique_by=lambda entry: entry[0], max_size=6))


@settings(fuzzed, max_examples=300)
@given((st.lists(line, max_size=5).map("\n".join) | st.text(max_size=60)).map(encoded) | damaged(LIBSVM))
def test_libsvm_of_any_text_or_damage(folder, content):
    with one_line_at_most():
        labels, rows = read_sparse(written(folder, "rows.libsvm", content))
        assert len(labels) == len(rows) > 0
        assert all(np.isfinite(row["value"]).all() and (row["column"] >= 0).all() for row in rows)


@fuzzed
@given(st.lists(row, min_size=1, max_size=6))
def test_libsvm_that_is_right_is_read_right(folder, rows):
    lines = [f"{label} " + " ".join(f"{c}:{v!r}" for c, v in sorted(entries)) for label, entries in rows]
    labels, found_rows = read_sparse(written(folder, "rows.libsvm", "\n".join(lines).encode()))
    assert labels == [str(label) for label, _ in rows]
    for found, (_, entries) in zip(found_rows, rows, strict=True):
        assert [(int(c) + 1, float(v)) for c, v in found.tolist()] == sorted(entries)


def read_rows(file):
    """Read a table as its store is built from it."""
    with one_line_at_most():
        table = RowTable(file, "label")
        assert len(set(table.columns)) == len(table.columns) > 0
        for block in table.blocks(np.arange(len(table)), table.classes):
            assert np.isfinite(block.x).all() and block.x.shape[1] == len(table.columns)
            assert ((block.y >= 0) & (block.y < len(table.classes))).all()


cell = st.text('0123456789.-+eNaif"\r', max_size=5) | st.text(max_size=4) | st.sampled_from(["NaN", "inf", "1e300", ""])
CSV = b"a,b,label\n1,2.5,cat\n-3,1e10,dog\n\n0,0.125,cat\n"
csv_lines = st.lists(st.lists(cell, min_size=1, max_size=3).map(",".join), max_size=5)
csv_text = csv_lines.map(lambda lines: "\n".join(["a,label", *lines]))


@settings(fuzzed, max_examples=400)
@given(csv_text.map(encoded) | st.binary(max_size=80) | damaged(CSV))
def test_csv_of_any_text_bytes_or_damage(folder, content):
    read_rows(written(folder, "rows.csv", content))


def read_images(file):
    """Read images as their store is built from them."""
    with one_line_at_most():
        table = ImageTable([file], "")
        assert not table.length or table.classes
        for _, images, y, shape in surveyed(table, size=4):
            assert decode_all(images, shape, table.name).shape == (len(y), 4, 4, shape[0])


def read_coreset(file):
    with one_line_at_most():
        coreset = load_coreset(str(file), eight_samples(), Dataset())
        assert set(coreset.indices.tolist()) <= set(range(1, 8))
        assert (coreset.weights >= 0).all() and coreset.weights.isfinite().all()


def eight_samples():
    split = Split.from_tensors(torch.zeros(8, 1), torch.arange(8) % 2)
    return Samples.all_of(split)._replace(held_out=torch.tensor([0]))


@pytest.fixture(scope="module")
def parquet(folder):
    """The bytes of a table, of images and of a coreset."""
    table = pa.table({"a": np.arange(20.0), "b": np.arange(20), "label": ["cat", "dog"] * 10})
    pq.write_table(table, folder / "good.parquet")
    images = [samples.encode(image) for image in samples.pixels(3)]
    samples.write_parquet(folder / "images.parquet", images, [0, 1, 2])
    coreset = Coreset(torch.tensor([5, 1, 3]), torch.tensor([1.0, 2.0, 0.5]))
    save_coreset(Storage(str(folder)), coreset, eight_samples(), RunSettings(), {"seed": 0})
    files = {read_rows: "good.parquet", read_images: "images.parquet", read_coreset: "coreset.parquet"}
    return {read: (folder / name).read_bytes() for read, name in files.items()}


@pytest.mark.parametrize("read", [read_rows, read_images, read_coreset])
@fuzzed
@given(st.data())
def test_parquet_that_is_damaged(folder, parquet, read, data):
    read(written(folder, "damaged.parquet", data.draw(damaged(parquet[read]))))


keys = st.sampled_from(["info", "features", "label", "names", "_type"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)


def nested(inner):
    return {"info": {"features": {"label": inner}}}


@fuzzed
@given(values | values.map(nested) | values.map(lambda names: nested({"names": names})))
def test_any_metadata_of_parquet(folder, metadata):
    schema = pa.schema({"image": pa.binary(), "label": pa.int64()}, {"huggingface": json.dumps(metadata)})
    pq.write_table(pa.table([[b"a", b"b"], [0, 1]], schema), folder / "named.parquet")
    with one_line_at_most():
        classes = ImageTable([folder / "named.parquet"], "").classes
        assert all(isinstance(name, str) for name in classes) and len(set(classes)) == len(classes)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
@fuzzed
@given(st.data())
def test_images_that_are_damaged(kind, data):
    content = data.draw(damaged(samples.encode(samples.pixels(1, 12, 12)[0], kind)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, of damage that it can live with
        try:
            assert decode_all([content], (3, 8, 8), str).shape == (1, 8, 8, 3)
        except UserError as error:
            assert "does not decode" in str(error)


DTYPES = st.sampled_from([torch.int64, torch.int32, torch.float32, torch.float64, torch.bool])
NUMBERS = st.lists(st.integers(-2, 5), max_size=4)


@fuzzed
@given(NUMBERS, DTYPES, NUMBERS | st.lists(st.floats(width=32), max_size=4), DTYPES)
def test_any_coreset(indices, of_indices, weights, of_weights):
    with one_line_at_most():
        coreset = Coreset(torch.tensor(indices).to(of_indices), torch.tensor(weights).to(of_weights))
        assert coreset.indices.tolist() == indices and len(set(indices)) == len(indices) == len(coreset.weights)
        assert min(indices, default=0) >= 0 and (coreset.weights >= 0).all()


ARRAYS = st.sampled_from([np.float32, np.float64, np.uint8, np.int64, np.bool_, object, "U2", np.complex64])


@fuzzed
@given(st.lists(st.integers(0, 3), max_size=3), ARRAYS, NUMBERS, ARRAYS)
def test_any_arrays(shape, of_x, labels, of_y):
    with one_line_at_most():
        split = Split.from_tensors(np.ones(shape, of_x), np.array(labels).astype(of_y))
        assert split.y.tolist() == labels and len(split) == shape[0]

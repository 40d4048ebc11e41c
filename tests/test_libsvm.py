"""Sparse rows in libsvm's form."""

import bz2

import pytest
import torch

from raypkg.core.errors import UserError
from raypkg.data import load_data

TEXT = "+1 1:0.5 3:-2 # a remark\n-1 2:1e-3\n\n1.0 4:4\n-1\n"


@pytest.fixture
def load(tmp_path):
    def load(content=TEXT, name="rows.libsvm", **options):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_data(f"libsvm:{tmp_path / name}", options, cache=tmp_path / "cache")

    return load


def rows(split):
    return sorted(map(tuple, torch.cat([split.y[:, None], split.batch(range(len(split)))[0]], 1).tolist()))


EXPECTED = [(0, 0, 0, 0, 0), (0, 0, pytest.approx(1e-3), 0, 0), (1, 0, 0, 0, 4), (1, 0.5, 0, -2, 0)]


@pytest.mark.parametrize(("content", "name"), [(TEXT, "rows.libsvm"), (bz2.compress(TEXT.encode()), "rows.bz2")])
def test_rows_come_back_dense_in_the_order_asked_for(load, content, name):
    data = load(content, name, test=0.25)
    assert (data.train.classes, data.train.shape, len(data.train), len(data.test)) == (("-1", "1"), (4,), 3, 1)
    assert sorted(rows(data.train) + rows(data.test)) == EXPECTED
    every = data.train.batch([0, 1, 2])[0]
    assert torch.equal(data.train.batch([2, 0, 2])[0], every[[2, 0, 2]])


def test_two_files_share_their_width_which_can_be_given(load, tmp_path):
    for name, text in {"train": TEXT, "test": "1 7:1\n"}.items():
        (tmp_path / f"{name}.svm").write_text(text)
    data = load_data(f"libsvm:{tmp_path}", cache=tmp_path / "cache")
    assert (data.train.shape, len(data.train), len(data.test)) == ((7,), 4, 1)
    (tmp_path / "test.svm").write_text("5 7:1\n")
    with pytest.raises(UserError, match="unknown class of the test rows '5'"):
        load_data(f"libsvm:{tmp_path}", cache=tmp_path / "cache")
    assert load(test=0.25, columns=9).train.shape == (9,)
    with pytest.raises(UserError, match=r"option columns = 3, but .* has column 4"):
        load(columns=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 1:2\nx 1:2\n", r"line 2 of '.*rows.libsvm' begins with 'x', needed is a number, the label"),
        ("1 qid:4 1:2\n", r"line 1 .* has an entry that is not column:value"),
        ("1 0:2\n", r"line 1 .*: columns must begin at 1 and rise"),
        ("1 1:1\n0 1:1e300\n", r"line 2 .* holds NaN or infinity, or a number beyond float32"),
        ("\n# nothing\n", r"has no rows"),
        ("1\n0\n1\n0\n1\n0\n", r"no row of '.*rows.libsvm' has an entry column:value"),
        (b"\xff\xfe\x00", r"cannot be read"),
    ],
)
def test_refused_lines(load, content, message):
    with pytest.raises(UserError, match=message):
        load(content)

"""Ids, queues and conditions from texts that nobody thought of: one line refuses them, or the result is right."""

import json
import operator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypkg.core.errors import UserError
from raypkg.data.split import Split
from raypkg.methods.deltagrad.requests import KINDS, Request, matching, read_ids, read_queue

SETTINGS = settings(derandomize=True, deadline=None, max_examples=200)
LONGEST = 2000  # signs of an error, however long what is wrong
IDS = st.lists(st.integers(0, 2**63 - 1), min_size=1)
OUTSIDE = ("9223372036854775808", "18446744073709551615", "-9223372036854775809", "9" * 5000)


def attempt(read, *arguments):
    """Return what is read, or None where one line refuses it."""
    try:
        return read(*arguments)
    except UserError as error:
        line = str(error)
        assert line and "\n" not in line and len(line) < LONGEST
        return None


def refusal(read, *arguments):
    """Return the line by which something is refused."""
    assert attempt(read, *arguments) is None
    with pytest.raises(UserError) as error:
        read(*arguments)
    return str(error.value)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("given") / "given"


# Ids


@SETTINGS
@given(st.text() | st.text(alphabet="0123456789,.-+ eE"))
def test_any_text_is_a_list_of_ids_or_refused(text):
    ids = attempt(read_ids, text)
    assert ids is None or ids == [int(part) for part in text.split(",")]


@SETTINGS
@given(ids=IDS, gap=st.sampled_from([" ", "\n", "\r\n", "\t\n\n"]), mark=st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_a_list_or_a_file_of_ids_is_read(file, ids, gap, mark):
    assert read_ids(",".join(map(str, ids))) == ids
    file.write_bytes(mark + gap.join(map(str, ids)).encode())
    assert read_ids(str(file)) == ids


@SETTINGS
@given(st.binary() | st.text(alphabet="0123456789,.- \n").map(str.encode))
def test_any_file_holds_ids_or_is_refused(file, content):
    file.write_bytes(content)
    ids = attempt(read_ids, str(file))
    assert ids is None or ids == [int(part) for part in content.decode("utf-8-sig").split()]


@SETTINGS
@given(position=st.integers(0, 10_000), flipped=st.integers(1, 255), missing=st.integers(0, 60))
def test_any_damage_of_a_parquet_file_of_ids(tmp_path_factory, position, flipped, missing):
    path = tmp_path_factory.getbasetemp() / "ids.parquet"
    pq.write_table(pa.table({"id": [3, 14, 15]}), path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= flipped
    path.write_bytes(content[: len(content) - missing])
    ids = attempt(read_ids, str(path))
    assert ids is None or len(ids) == 3


@pytest.mark.parametrize(
    "text", ["-1", "1.5", "3,", "", ",", "1,,2", "1 2", "0x3", "1e3", "nan", "²", "٣", "3,٣", "a\nb", *OUTSIDE]
)
def test_what_is_no_id_is_shown_with_what_is_allowed(text):
    line = refusal(read_ids, text)
    assert line.startswith(f"ids {text[:100]!r} (no such file): '")
    assert "is no id; ids are whole numbers from 0 to 2⁶³ − 1: 3,14,15, or a file of them" in line


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        (pa.array([2**63], pa.uint64()), "9223372036854775808 is no id"),
        (pa.array([-1]), "-1 is no id"),
        (pa.array([None], pa.int64()), "None is no id"),
        (pa.array([], pa.int64()), "holds no ids"),
    ],
    ids=str,
)
def test_ids_of_parquet_are_shown_as_they_are(tmp_path, column, shown):
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table({"id": column}), path)
    assert shown in refusal(read_ids, str(path))
    pq.write_table(pa.table([[1], [2]], names=["id", "id"]), path)
    assert "ids.parquet' cannot be read: Multiple matches for FieldRef.Name(id)" in refusal(read_ids, str(path))


def test_a_folder_holds_neither_ids_nor_a_queue(tmp_path):
    (tmp_path / "folder.parquet").mkdir()
    for name in (".", "folder.parquet"):
        assert "cannot be read: it is not a regular file" in refusal(read_ids, str(tmp_path / name))
    assert f"the queue '{tmp_path}' cannot be read: Is a directory" in refusal(read_queue, tmp_path)


# Queues


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
NAMES = st.text(st.characters(categories=["L", "N", "P"]), min_size=1)
REQUESTS = st.one_of(
    st.builds(Request, st.sampled_from(["delete", "restore"]), IDS, NAMES),
    st.builds(Request, st.sampled_from(["delete_where", "add"]), st.text(), NAMES),
)


@SETTINGS
@given(requests=st.lists(REQUESTS, min_size=1, unique_by=lambda request: request.id), ascii=st.booleans())
def test_a_queue_is_read(file, requests, ascii):
    lines = [json.dumps({kind: value, "id": name}, ensure_ascii=ascii) for kind, value, name in requests]
    file.write_bytes("\n".join(lines).encode())
    assert read_queue(file) == requests


@SETTINGS
@given(kind=st.sampled_from([*KINDS, "remove", ""]), value=VALUES, name=VALUES)
def test_any_object_is_a_request_or_refused(file, kind, value, name):
    file.write_text(json.dumps({kind: value, "id": name}))
    requests = attempt(read_queue, file)
    if kind in ("delete", "restore"):
        fits = isinstance(value, list) and value and all(type(item) is int and 0 <= item < 2**63 for item in value)
    else:
        fits = kind in ("delete_where", "add") and isinstance(value, str)
    named = type(name) is int or (isinstance(name, str) and name.strip() and name.isprintable())
    assert requests == ([Request(kind, value, str(name))] if fits and named else None)


@SETTINGS
@given(st.binary() | VALUES.map(json.dumps).map(str.encode) | st.text(alphabet='{}[]":,0 \nidelt').map(str.encode))
def test_any_file_is_a_queue_or_refused(file, content):
    file.write_bytes(content)
    requests = attempt(read_queue, file)
    assert requests is None or all(request.kind in KINDS and request.id for request in requests)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"delete": [1], "id": {}}', "the id must be a text of printable characters or an integer, not {}"),
        ('{"delete": ' + "[" * 5000 + "]" * 5000 + ', "id": 1}', "is not JSON: maximum recursion depth"),
        ('{"delete": NaN, "id": 1}', "delete takes a list of ids, not nan"),
        ('{"delete": [' + "9" * 5000 + '], "id": 1}', "is not JSON: Exceeds the limit"),
        ('{"delete": [1], "id": 1, "id": 2}', "is not JSON: a name occurs twice"),
        ('{"delete": [1], "restore": [1], "id": 1}', "must be an object with one of delete, delete_where, restore,"),
        ('{"' + "x" * 100_000 + '": 1, "id": 1}', "unknown request in line 2 of"),
    ],
    ids=lambda text: text[:30],
)
def test_a_line_that_is_no_request_is_named(file, line, says):
    file.write_text('{"delete": [1], "id": "first"}\n' + line)
    assert says in refusal(read_queue, file)


def test_an_integer_and_its_digits_are_one_id_and_an_empty_queue_is_none(file):
    file.write_bytes(b"\xef\xbb\xbf\n \r\n")
    assert read_queue(file) == []
    file.write_text('{"delete": [1], "id": 0}\n{"delete": [2], "id": "0"}')
    assert "has the id '0' 2 times" in refusal(read_queue, file)


# Conditions


COLUMNS = ("age", "größe", "a b")
SPLIT = replace(
    Split.from_tensors(
        torch.tensor([[0.5, -1.0, 3e38], [0.1, 2.0, 0.0], [-7.0, 2.0, 1e-40]]),
        torch.tensor([0, 1, 1]),
        classes=("cat", "Katze Ä"),
    ),
    columns=COLUMNS,
)
ROWS = SPLIT.take(np.arange(3))
COMPARISONS = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
CLAUSES = st.tuples(st.sampled_from(COLUMNS), st.sampled_from([*COMPARISONS]), st.floats(width=32, allow_nan=False))
WORDS = (*COLUMNS, "label", "and", "=", "<", "1", "'", "cat")
SPACES = st.sampled_from([" ", "  ", "\t"])


@SETTINGS
@given(clauses=st.lists(CLAUSES, min_size=1, max_size=4), space=SPACES, word=st.sampled_from(["and", "AND", "And"]))
def test_clauses_select_what_comparing_row_by_row_does(clauses, space, word):
    texts = [f"{name}{space}{comparison}{value!r}" for name, comparison, value in clauses]
    got = attempt(matching, SPLIT, f" {word}{space}".join(texts))
    if any(np.isinf(value) for *_, value in clauses):
        assert got is None
        return
    expected = np.ones(3, bool)
    for name, comparison, value in clauses:
        expected &= COMPARISONS[comparison](ROWS[:, COLUMNS.index(name)], np.float32(value))
    assert got.tolist() == expected.nonzero()[0].tolist()


@SETTINGS
@given(st.text() | st.text(alphabet="age=<>!12. and'") | st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_any_text_is_a_condition_or_refused(text):
    rows = attempt(matching, SPLIT, text)
    assert rows is None or set(rows.tolist()) <= {0, 1, 2}


@pytest.mark.timeout(20)  # with what costs their square or cube it would take hours
@pytest.mark.parametrize("space", [" ", "\t\n"])
def test_a_hundred_thousand_spaces_or_clauses_cost_nothing(space):
    spaces = space * 100_000
    condition = spaces.join(["", "age", ">", "0", "and", "label", "=", "cat", ""])
    assert matching(SPLIT, condition).tolist() == [0]
    assert "is not of the form" in refusal(matching, SPLIT, spaces)
    assert "is not of the form" in refusal(matching, SPLIT, f"age{spaces}and")
    assert matching(SPLIT, " and ".join(["age > 0"] * 10_000)).tolist() == [0, 1]

"""Sparse rows in libsvm's text form, as RCV1 is handed on: ``label column:value column:value …``."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from raypkg.core.errors import UserError, unknown
from raypkg.data.split import Split
from raypkg.data.store.arrow import Block, Header, Store, write
from raypkg.data.store.cache import cache_folder, cached, fingerprint
from raypkg.data.store.rows import held_out, row_files

from . import dataset

SUFFIXES = (".libsvm", ".svm", ".txt", ".bz2", ".gz")
ENTRY = np.dtype([("column", "<i4"), ("value", "<f4")])  # of a stored row, columns from 0
BLOCK = 1 << 14  # rows on their way into the store


@dataset("libsvm", source="doi:10.1145/1961189.1961199")
def load(
    root: str,
    *,
    split: str,
    cache: Path | None,
    columns: Annotated[int, Field(ge=1)] | None = None,
    test: Annotated[float, Field(ge=0, lt=1)] = 0.2,
) -> Split:
    """Sparse rows in libsvm's form, columns from 1: one file (.bz2 and .gz are unpacked), or a folder with two.

    Of one file, the share ``test`` is the test split, drawn by its length alone. The sorted labels are the classes.
    Rows stay sparse on the disk and become dense float32 batch by batch; they are not standardised, so zero is zero.

    Args:
        root: PATH of a file, or of a folder with train.libsvm and test.libsvm (or another of the endings).
        split: "train" or "test".
        cache: folder of the memory-mapped stores.
        columns: D, when it is more than the largest column that occurs in either file.
        test: share of a single file.

    Raises:
        UserError: missing files, lines in another form, values that are not finite, a column above ``columns``.
    """
    path, files = Path(root), row_files(root, SUFFIXES)
    key = fingerprint(files.values(), columns=columns, test=test)
    target = cache_folder(cache) / f"{path.resolve().name.partition('.')[0]}-{split}-{key}.arrow"

    def build(unfinished: Path) -> None:
        found = {file: read(file) for file in set(files.values())}
        train, chosen = found[files["train"]], found[files[split]]
        largest = max(int(entries["column"].max(initial=-1)) for _, rows in found.values() for entries in rows) + 1
        if columns is not None and largest > columns:
            raise UserError(f"option columns = {columns}, but {str(path)!r} has column {largest}")
        classes = tuple(sorted(set(train[0]), key=float))
        rows = held_out(len(chosen[0]), test, split, path) if path.is_file() else np.arange(len(chosen[0]))
        write(unfinished, Header("encoded", (columns or largest,), classes), _blocks(*chosen, rows, classes))

    store = cached(target, build)
    wide = store.header.shape[0]
    return replace(store.as_split(partial(_dense, store)), mean=(0.0,) * wide, std=(1.0,) * wide)


def read(file: Path) -> tuple[list[str], list[np.ndarray]]:
    """Return the labels and the sparse rows of a file, each row an array of ``ENTRY``.

    Raises:
        UserError: it cannot be read, has no rows, or a line is in another form.
    """
    labels, rows = [], []
    try:
        with pa.input_stream(str(file), compression="detect") as stream:
            for number, line in enumerate(_lines(stream), 1):
                label, *entries = line.partition("#")[0].split() or [""]
                if label:
                    labels.append(_label(label, f"line {number} of {str(file)!r}"))
                    rows.append(_row(entries, f"line {number} of {str(file)!r}"))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"table {str(file)!r} cannot be read: {error}") from None
    if not rows:
        raise UserError(f"table {str(file)!r} has no rows")
    return labels, rows


def _lines(stream: pa.NativeFile) -> Iterator[str]:
    rest = b""
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from (line.decode() for line in lines)
    yield rest.decode()


def _label(label: str, where: str) -> str:
    """Return a label in one spelling: ``+1``, ``1`` and ``1.0`` are the same class."""
    try:
        value = float(label)
        return str(int(value)) if value == int(value) else str(value)
    except (ValueError, OverflowError):
        raise UserError(f"{where} begins with {label!r}, needed is a number, the label") from None


def _row(entries: list[str], where: str) -> np.ndarray:
    try:
        pairs = [(int(column) - 1, float(value)) for column, value in (entry.split(":") for entry in entries)]
        row = np.array(pairs, ENTRY)
    except (ValueError, OverflowError):
        raise UserError(f"{where} has an entry that is not column:value") from None
    if len(row) and (row["column"][0] < 0 or (np.diff(row["column"]) <= 0).any()):
        raise UserError(f"{where}: columns must begin at 1 and rise")
    if not np.isfinite(row["value"]).all():
        raise UserError(f"{where} holds NaN or infinity")
    return row


def _blocks(labels: list[str], rows: list[np.ndarray], chosen: np.ndarray, classes: tuple[str, ...]) -> Iterator[Block]:
    place = {name: number for number, name in enumerate(classes)}
    if strange := set(labels) - place.keys():
        raise unknown("class of the test rows", min(strange), classes)
    for part in np.split(chosen, range(BLOCK, len(chosen), BLOCK)):
        y = np.array([place[labels[i]] for i in part])
        yield Block([rows[i].tobytes() for i in part], y, np.zeros((1, 1)))  # rows are not standardised


def _dense(store: Store, indices: np.ndarray) -> np.ndarray:
    """Gather rows as float32 [b, D]."""
    rows = [store.encoded(int(i)) for i in indices]
    entries = np.frombuffer(b"".join(rows), ENTRY)
    place = np.repeat(np.arange(len(rows)), [row.size // ENTRY.itemsize for row in rows])
    x = np.zeros((len(rows), *store.header.shape), np.float32)
    x[place, entries["column"]] = entries["value"]
    return x

"""Rows of numbers on disk: one file, a share of which is the test split, or a folder with a file for each split."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import torch

from raypkg.core.errors import UserError, unknown
from raypkg.core.seeds import generator
from raypkg.data.files import Place
from raypkg.data.split import repeated

SPLITS = ("train", "test")


def row_files(path: Place, suffixes: tuple[str, ...]) -> dict[str, Place]:
    """Return the file of each split; a single file is that of both.

    Raises:
        UserError: no file with one of the suffixes, or several for a split.
    """
    if path.is_dir():
        files = {split: _only(path, split, suffixes) for split in SPLITS}
    else:
        files = dict.fromkeys(SPLITS, path)
    wrong = [file for file in files.values() if not file.is_file() or not file.name.endswith(suffixes)]
    if wrong:
        endings = ", ".join(suffixes)
        raise UserError(f"table {str(wrong[0])!r} is not a file with one of the endings {endings}")
    return files


def split_rows(
    files: Mapping[str, Place], split: str, n: int, test: float, ids: np.ndarray | None = None
) -> np.ndarray:
    """Return which of the n rows of its file make a split, int64 ascending.

    All of them where each split has its own file. Of a single file, the share ``test`` is the test split: a draw that
    depends on nothing but the number of rows, so that every process and every later run finds the same split. Rows of
    one id stay together: they are one sample.

    Raises:
        UserError: there would be none.
    """
    if files["train"] != files["test"]:
        return np.arange(n)
    sample = np.arange(n) if ids is None else np.unique(ids, return_inverse=True)[1]  # that each row stands for, [n]
    count = int(sample.max()) + 1
    order = torch.randperm(count, generator=generator(0, "test split")).numpy()
    held = round(test * count)
    drawn = order[:held] if split == "test" else order[held:]
    rows = np.flatnonzero(np.isin(sample, drawn))
    if not len(rows):
        raise UserError(f"option test = {test:g} leaves no {split} samples of the {n} in {str(files[split])!r}")
    return rows


@contextmanager
def reading(file: Place) -> Iterator[None]:
    """Say of a file what Arrow finds wrong with it.

    Raises:
        UserError: it cannot be read: damaged, not of its kind, not UTF-8, not ours to read.
    """
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"table {str(file)!r} cannot be read: {error}") from None


def check_distinct(columns: Sequence[str], file: Place) -> None:
    """Refuse columns of one name: nobody could say which is meant."""
    if (twice := repeated(columns)) is not None:
        raise UserError(f"table {str(file)!r} has two columns {twice!r} among {', '.join(columns)}")


def class_numbers(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Return the labels as numbers of their classes, int64.

    Raises:
        UserError: a label that is none of the classes, which are those of the train rows.
    """
    number = {name: c for c, name in enumerate(classes)}
    strange = set(labels) - number.keys()
    if strange:
        raise unknown("class of the test rows", min(strange), classes)
    return np.array([number[label] for label in labels], np.int64)


def _only(folder: Place, split: str, suffixes: tuple[str, ...]) -> Place:
    names = [f"{split}{suffix}" for suffix in suffixes]
    files = [folder / name for name in names if (folder / name).is_file()]
    if len(files) != 1:
        first = ", ".join(names[:-1])
        raise UserError(f"folder {str(folder)!r} needs one of {first} and {names[-1]}, it has {len(files)}")
    return files[0]

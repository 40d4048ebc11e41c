"""Data sets that need no files of the user: digits that ship with the package, and made-up rows for timings.

Both are held in memory: a training on them imports nothing of the store.
"""

from importlib.resources import as_file, files
from typing import Annotated, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import Field

from raypkg.core.errors import UserError
from raypkg.core.memory import check_memory
from raypkg.core.seeds import generator
from raypkg.data.split import Split

from . import dataset

SHAPES = {"covtype": (581_012, 54, 7), "higgs": (11_000_000, 28, 2), "rcv1": (20_242, 47_236, 2)}  # rows, columns, C
SPREAD = 2.0  # of a class around its centre, whose coordinates have variance 1


@dataset("digits", source="doi:10.24432/C50P49")
def digits(root: str, *, split: str) -> Split:
    """Handwritten digits, 8×8 grey: 1,437 to train, 360 to test.

    The test samples of Optical Recognition of Handwritten Digits (E. Alpaydin and C. Kaynak, 1998), UCI Machine
    Learning Repository, licensed CC BY 4.0. Pixel values 0 … 16 are scaled to 0 … 255. The file's column ``test``
    fixes the split, which is stratified by class.
    """
    if root:
        raise UserError(f"dataset 'digits' ships with the package and takes no path, got {root!r}")
    # Read by path: Arrow's threads may outlive a file that Python has opened.
    with as_file(files("raypkg.data.sources") / "digits.parquet") as path:
        table = pq.read_table(path)
    rows = table["test"].to_numpy() == (split == "test")  # [n]
    images = b"".join(table["x"].to_pylist())
    levels = np.frombuffer(images, np.uint8).reshape(-1, 1, 8, 8)  # 0 … 16
    pixels = (levels[rows].astype(np.uint16) * 255 + 8) // 16  # to the nearest of 0 … 255
    y = table["y"].to_numpy()[rows]
    return Split.from_tensors(pixels.astype(np.uint8), y, augment=("crop",))


@dataset("synthetic")
def synthetic(
    root: str,
    *,
    split: str,
    like: Literal["covtype", "higgs", "rcv1"] = "covtype",
    rows: Annotated[int, Field(ge=10)] | None = None,
) -> Split:
    """Made-up rows of the shape of covtype, HIGGS or RCV1: their numbers of rows, columns and classes, no real sample.

    Each class is normal around a centre, whatever the real data are like. ``rows`` to train on (default: as many as the
    data set has), a tenth of that to test on.

    Raises:
        UserError: a path, or more rows than this machine's memory holds.
    """
    if root:
        raise UserError(f"dataset 'synthetic' takes no path, got {root!r}: give dataset.options.like")
    most, columns, classes = SHAPES[like]
    n = rows or most
    n = n if split == "train" else max(n // 10, classes)
    check_memory(f"{n:,} rows of {columns:,} columns", 2 * 4 * n * columns, "give a smaller dataset.options.rows")
    rng = generator(0, "synthetic", like, split)
    y = (torch.arange(n) % classes)[torch.randperm(n, generator=rng)]
    centres = torch.randn(classes, columns, generator=generator(0, "synthetic", like))
    x = torch.randn(n, columns, generator=rng).mul_(SPREAD).add_(centres[y])
    return Split.from_tensors(x, y)

"""Made-up rows of the shapes of public data sets, for timings without the data."""

from typing import Annotated, Literal

import torch
from pydantic import Field

from raypkg.core.errors import UserError
from raypkg.core.memory import check_memory
from raypkg.core.seeds import generator
from raypkg.data.split import Split

from . import dataset

SHAPES = {"covtype": (581_012, 54, 7), "higgs": (11_000_000, 28, 2), "rcv1": (20_242, 47_236, 2)}  # rows, columns, C
SPREAD = 2.0  # of a class around its centre, whose coordinates have variance 1


@dataset("synthetic")
def load(
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

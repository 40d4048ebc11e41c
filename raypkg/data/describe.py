"""A data set as a table."""

import torch
from rich.table import Table

from . import Data

NAMED = 10  # classes that are listed by name
CHANNELS = 4  # images have at most so many


def describe(name: str, data: Data) -> Table:
    """Return sizes, shape, classes and the default augmentation of a data set."""
    train = data.train
    augment = ", ".join(train.augment) or "none"
    counts = torch.bincount(train.y, minlength=train.num_classes)  # [C]
    names = train.classes[:NAMED]
    if train.num_classes > NAMED:
        names = (*names, "…")

    table = Table(title=name, title_justify="left", show_header=False)
    table.add_row("samples", f"{len(train):,} train, {len(data.test):,} test")
    table.add_row("shape", train.kind.words(train.shape))
    table.add_row("classes", f"{train.num_classes}: {', '.join(names)}")
    table.add_row("samples a class", f"{counts.min():,} to {counts.max():,}")
    table.add_row("augmentation", augment)
    if 0 < len(train.mean) <= CHANNELS:  # a table's columns would fill the screen
        table.add_row("mean, std", f"{_numbers(train.mean)}, {_numbers(train.std)}")
    return table


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3f}" for value in values)

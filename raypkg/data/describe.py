"""A data set as a table."""

import torch
from rich.table import Table

from . import Data


def describe(name: str, data: Data) -> Table:
    """Return sizes, shape, classes and the default augmentation of a data set."""
    table = Table(title=name, title_justify="left", show_header=False)
    train = data.train
    counts = torch.bincount(train.y, minlength=train.num_classes)
    names = ", ".join(train.classes[:10]) + (", …" if train.num_classes > 10 else "")
    rows = {
        "samples": f"{len(train):,} train, {len(data.test):,} test",
        "shape": " × ".join(map(str, train.shape)),
        "classes": f"{train.num_classes}: {names}",
        "samples a class": f"{int(counts.min()):,} to {int(counts.max()):,}",
        "augmentation": ", ".join(train.augment) or "none",
    }
    if len(train.mean) <= 4:
        rows["mean, std"] = f"{_numbers(train.mean)}, {_numbers(train.std)}"
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3f}" for value in values)

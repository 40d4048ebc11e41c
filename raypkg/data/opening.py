"""From settings to samples: load a data set, and make its training split harder as requested.

The regimes are wrong labels, a long tail of rare classes, and repeated samples. None copies a sample.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import Dataset

from . import Data, load_data
from .split import Split, Take

NUMBERS_AT_ONCE = 2**24  # when the range of columns is measured
LARGEST = 2**31  # samples after repetition
NAMED = 10  # classes listed by name
CHANNELS = 4  # most channels of an image


def open_data(chosen: Dataset, seed: int | None = None) -> Data:
    """Load the data set named in settings and apply its regimes to the training split.

    The order is imbalance, noise, repeat, so copies of a sample share its label. All act on the whole training split,
    **held-out samples included**: no method sees labels that a user in this position would not have. Copies of a
    sample are held out together. The test split is unchanged. ``seed`` draws if the settings have no seed.
    """
    stream = None
    if chosen.streamed:
        from .store.cache import cache_folder  # with the store, which data sets in memory do not need
        from .store.streamed import Stream

        stream = Stream(chosen.streamed, chosen.window, cache_folder())
    data = load_data(chosen.name, chosen.options, cache=stream)
    if chosen.streamed and data.train.blocks is None:
        raise UserError(f"dataset.streamed: the samples of {chosen.name!r} are in memory: leave it out")
    seed = seed if chosen.seed is None else chosen.seed
    if seed is None:
        if chosen.is_drawn:
            raise UserError("dataset.noise and dataset.imbalance are drawn by a seed: give dataset.seed")
        seed = 0
    train = data.train
    if chosen.imbalance < 1:
        train = subset(train, long_tail(train.y, chosen.imbalance, generator(seed, "imbalance")))
    if chosen.noise:
        train = with_wrong_labels(train, chosen.noise, generator(seed, "noise"))
    if chosen.repeat > 1:
        if len(train) * chosen.repeat > LARGEST:
            raise UserError(f"dataset.repeat = {chosen.repeat} of {len(train):,} samples: at most {LARGEST:,} in all")
        # Copies are consecutive. With augmentation, each is drawn as a different image.
        train = subset(train, torch.arange(len(train)).repeat_interleave(chosen.repeat))
    if not train.mean and chosen.scale != type(chosen).model_fields["scale"].default:
        raise UserError(f"dataset.scale = {chosen.scale}: texts have no numbers to scale")
    mean, std = normalisation(train, chosen.scale)
    return Data(replace(train, mean=mean, std=std), replace(data.test, mean=mean, std=std))


def normalisation(train: Split, scale: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return shift and scale of inputs by channel or column, pixels in units of 1/255; texts have neither."""
    count = len(train.mean)
    if scale == "standard" or not count:
        return train.mean, train.std
    is_image = len(train.shape) > 1
    if scale == "none" or is_image:
        return (0.0,) * count, (1 / 255 if is_image and scale == "none" else 1.0,) * count
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    for rows in torch.arange(len(train)).split(max(1, NUMBERS_AT_ONCE // count)):
        x = train.take(rows.numpy())
        low, high = np.minimum(low, x.min(0)), np.maximum(high, x.max(0))
    width = np.where(high > low, high - low, 1.0)
    return tuple(low.tolist()), tuple(width.tolist())


def long_tail(y: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Return positions of a long tail: class c keeps up to n_max · share^(c / (C − 1)) samples, and at least one.

    n_max is the size of the largest class. Positions are int64, ascending.
    """
    sizes = y.bincount()  # [C]
    order = torch.randperm(len(y), generator=rng)
    kept = []
    for label, size in enumerate(sizes.tolist()):
        wanted = max(1, round(int(sizes.max()) * share ** (label / max(len(sizes) - 1, 1))))
        members = order[y[order] == label]
        kept.append(members[: min(size, wanted)])
    return torch.cat(kept).sort().values


def with_wrong_labels(split: Split, share: float, rng: torch.Generator) -> Split:
    """Replace round(share · n) labels by another class each, uniformly drawn; ``truth`` keeps the original labels."""
    classes = split.num_classes
    if classes < 2:
        raise UserError(f"dataset.noise = {share:g}: the data set has one class, so no label can be another")
    n = len(split)
    wrong = torch.randperm(n, generator=rng)[: round(share * n)]
    shift = torch.randint(1, classes, (len(wrong),), generator=rng)
    y = split.y.clone()
    y[wrong] = (y[wrong] + shift) % classes
    return replace(split, y=y, truth=split.y)


def wrong_share(split: Split, positions: Tensor) -> float | None:
    """Return the share of some samples that has a wrong label; None if true labels are unknown."""
    if split.truth is None or not len(positions):
        return None
    return float((split.y[positions] != split.truth[positions]).double().mean())


def subset(split: Split, positions: Tensor) -> Split:
    """Return the samples at some positions, which may repeat, as a split; its ``ids`` refer to the original."""
    return replace(
        split,
        take=partial(_take_at, split.take, positions.numpy()),
        y=split.y[positions],
        ids=positions if split.ids is None else split.ids[positions],
        truth=None if split.truth is None else split.truth[positions],
        blocks=None if split.blocks is None else split.blocks.at(positions),
    )


def _take_at(take: Take, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return take(positions[rows])


def describe(name: str, data: Data) -> Table:
    """Return a table of sizes, shape, classes and default augmentation of a data set."""
    train = data.train
    counts = torch.bincount(train.y, minlength=train.num_classes)  # [C]
    names = [*train.classes[:NAMED], *["…"] * (train.num_classes > NAMED)]
    table = Table(title=name, title_justify="left", show_header=False)
    table.add_row("samples", f"{len(train):,} train, {len(data.test):,} test")
    table.add_row("shape", train.kind.words(train.shape))
    table.add_row("classes", f"{train.num_classes}: {', '.join(names)}")
    table.add_row("samples a class", f"{counts.min():,} to {counts.max():,}")
    table.add_row("augmentation", ", ".join(train.augment) or "none")
    if 0 < len(train.mean) <= CHANNELS:  # a table's columns would fill the screen
        mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (train.mean, train.std))
        table.add_row("mean, std", f"{mean}, {std}")
    return table

"""Samples of one data set in the form of another."""

from dataclasses import replace

import torch

from raypkg.core.errors import UserError, unknown

from .split import Split


def aligned(split: Split, like: Split, whose: str) -> Split:
    """Return a split with the classes and the normalisation of another.

    Args:
        split: samples of the same shape, whose classes the other has as well, in any order.
        like: the other.
        whose: names the samples in an error.

    Raises:
        UserError: another shape, other columns where both have names, or a class that the other does not know.
    """
    if split.shape != like.shape:
        raise UserError(f"{whose}: samples of shape {split.shape}, those of training have {like.shape}")
    if split.columns and like.columns and split.columns != like.columns:
        ours = ", ".join(like.columns)
        raise UserError(f"{whose}: columns {', '.join(split.columns)}, those of training are {ours}")
    strange = [name for name in split.classes if name not in like.classes]
    if strange:
        raise unknown(f"class of {whose}", strange[0], like.classes)
    places = [like.classes.index(name) for name in split.classes]
    number = torch.tensor(places)  # in ``like``, of each class of the split
    return replace(split, y=number[split.y], classes=like.classes, mean=like.mean, std=like.std)

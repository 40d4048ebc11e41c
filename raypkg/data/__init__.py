"""Data sources, one file each, and the Split they all return."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from raypkg.core.errors import UserError
from raypkg.core.registry import USER_CODE, Entry, argument

from .sources import dataset

if TYPE_CHECKING:
    from .split import Split
    from .store.cache import Cache


class Data(NamedTuple):
    """The two splits of a data set, both with the train split's classes, shape and statistics."""

    train: "Split"
    test: "Split"


def load_data(name: str, options: Mapping[str, Any] | None = None, *, cache: "Cache" = None) -> Data:
    """Load a data set by name: ``digits``, ``cifar10``, ``parquet:PATH``, ``folder:PATH`` or ``module:function``.

    Args:
        name: a registered source, with what it needs after the colon, or the user's own function.
        options: the source's own options.
        cache: folder of the memory-mapped stores, by default ``$EFFRAY_CACHE``, then the user's cache folder; or where
            stores are read by blocks.

    Raises:
        UserError: unknown name or option, unreadable data, or splits that do not belong together.

    >>> digits = load_data("digits")
    >>> digits.train.shape, digits.train.num_classes, len(digits.test)
    ((1, 8, 8), 10, 360)
    """
    entry = dataset[name]
    _check_signature(entry, name)
    root = argument(name) if entry.name in dataset else ""  # the user's own function has no such part
    load = partial(_load, entry, name, root, options=options, cache=cache)
    train = load(split="train")
    test = load(split="test")
    differing = [what for what in ("shape", "classes") if getattr(train, what) != getattr(test, what)]
    if differing:
        a = getattr(train, differing[0])
        b = getattr(test, differing[0])
        raise UserError(f"dataset {name!r}: the splits differ in {differing[0]}: train has {a}, test has {b}")
    # Both are normalised alike, by what training may know.
    return Data(train, replace(test, mean=train.mean, std=train.std))


def _check_signature(entry: Entry, name: str) -> None:
    signature = inspect.signature(entry.function)
    if "split" not in signature.parameters:
        raise UserError(f"dataset {name!r}: its function must take a keyword split, which is 'train' or 'test'")
    try:
        signature.bind("", **dict.fromkeys(entry.declares))
    except TypeError:
        raise UserError(f"dataset {name!r} must be callable as function(root, split=…), not {signature}") from None


def _load(entry: Entry, name: str, root: str, **keywords: Any) -> "Split":
    """Call a source; what a user's own function raises keeps its traceback."""
    from .split import Split

    try:
        split = entry(root, **keywords)
    except OSError as error:
        if entry.source == USER_CODE:
            raise
        raise UserError(f"dataset {name!r} cannot be read: {error}") from None
    if not isinstance(split, Split):
        raise UserError(f"dataset {name!r} returned a {type(split).__name__}, not a raypkg.data.split.Split")
    return split

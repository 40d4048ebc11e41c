"""Data sources by name, and the Split that they all return."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from raypkg.core.errors import UserError
from raypkg.core.registry import argument

from .sources import dataset

if TYPE_CHECKING:
    from .split import Split
    from .store.cache import Cache


class Data(NamedTuple):
    """The two splits of a data set, both with the training split's classes, shape and statistics."""

    train: "Split"
    test: "Split"


def load_data(name: str, options: Mapping[str, Any] | None = None, *, cache: "Cache" = None) -> Data:
    """Load a data set by name: ``digits``, ``cifar10``, ``parquet:PATH``, ``folder:PATH`` or ``module:function``.

    ``cache`` is the folder of the memory-mapped stores (default: ``$EFFRAY_CACHE``, then the user's cache folder), or
    the location of stores that are read by blocks.

    Raises:
        UserError: unknown name or option, unreadable data, or splits that do not belong together.

    >>> digits = load_data("digits")
    >>> digits.train.shape, digits.train.num_classes, len(digits.test)
    ((1, 8, 8), 10, 360)
    """
    from .split import Split  # imports torch, which a list of sources does not need

    entry = dataset[name]
    signature = inspect.signature(entry.function)
    try:
        signature.bind("", **dict.fromkeys({"split", *entry.declares}))
    except TypeError:
        raise UserError(f"dataset {name!r} must be callable as function(root, *, split), not {signature}") from None
    root = argument(name) if entry.name in dataset else ""  # the user's own function has no argument

    def load(split: str) -> Split:
        try:
            loaded = entry(root, split=split, options=options, cache=cache)
        except OSError as error:
            raise UserError(f"dataset {name!r} cannot be read: {error}") from None
        if not isinstance(loaded, Split):
            raise UserError(f"dataset {name!r} returned a {type(loaded).__name__}, not a raypkg.data.split.Split")
        return loaded

    train = load("train")
    test = load("test")
    for what in ("shape", "classes"):
        ours, theirs = getattr(train, what), getattr(test, what)
        if ours != theirs:
            raise UserError(f"dataset {name!r}: the splits differ in {what}: train has {ours}, test has {theirs}")
    # The test split is normalised by statistics of the training split alone.
    return Data(train, replace(test, mean=train.mean, std=train.std))

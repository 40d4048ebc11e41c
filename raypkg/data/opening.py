"""From settings to samples: a data set by its name, where it is to lie, and as hard as it is asked to be."""

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import Dataset

from . import Data, load_data
from .regimes import long_tail, repeated_positions, taken, with_wrong_labels
from .store.cache import cache_folder
from .store.parts import Stream


def open_data(chosen: Dataset, seed: int | None = None) -> Data:
    """Load the data set that settings name, its training split changed as they say.

    The order is imbalance, noise, repeat: copies of a sample share its label. All three act on the whole training
    split, **held-out samples included**, so that no method sees a label that a user in this position would not have;
    copies of a sample are held out together. The test split stays as it is.

    Args:
        chosen: name, options, ``noise``, ``imbalance``, ``repeat`` and their ``seed``.
        seed: of the draws where ``chosen`` has none; a run stores it there.

    Raises:
        UserError: the data set cannot be read, has one class and is to have wrong labels, or nobody gives a seed.
    """
    data = load_data(chosen.name, chosen.options, cache=_stream(chosen))
    if chosen.streamed and data.train.blocks is None:
        raise UserError(f"dataset.streamed: the samples of {chosen.name!r} are in memory: leave it out")
    train = data.train
    seed = seed if chosen.seed is None else chosen.seed
    if seed is None:
        if chosen.is_drawn:
            raise UserError("dataset.noise and dataset.imbalance are drawn by a seed: give dataset.seed")
        seed = 0
    if chosen.imbalance < 1:
        train = taken(train, long_tail(train.y, chosen.imbalance, generator(seed, "imbalance")))
    if chosen.noise:
        train = with_wrong_labels(train, chosen.noise, generator(seed, "noise"))
    if chosen.repeat > 1:
        train = taken(train, repeated_positions(len(train), chosen.repeat))
    return data._replace(train=train)


def _stream(chosen: Dataset) -> Stream | None:
    """Return where stores are read by blocks, if the settings ask for that."""
    return Stream(chosen.streamed, chosen.window, cache_folder()) if chosen.streamed else None

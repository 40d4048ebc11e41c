"""Which samples a run trains on and which it holds out: the same in every process."""

from typing import NamedTuple

from torch import Tensor, nn

from raypkg.core.seeds import generator
from raypkg.core.settings import Dataset, Experiment
from raypkg.data import Data, load_data
from raypkg.data.coreset import Coreset
from raypkg.data.partition import hold_out
from raypkg.models import build_model

from .coreset_files import load_coreset


class Samples(NamedTuple):
    """A data set with its training positions and the held-out ones, both in the training split."""

    data: Data
    kept: Tensor  # int64 [n], ascending
    valid: Tensor  # int64 [v], ascending

    @property
    def everyone(self) -> Coreset:
        """All training samples, unweighted."""
        return Coreset.uniform(self.kept)


def samples(dataset: Dataset, seed: int) -> Samples:
    """Open the data set and hold out its validation share, stratified, by the seed; keep what else is asked for."""
    data = load_data(dataset.name, dataset.options)
    kept, valid = hold_out(data.train.y, dataset.validation, generator(seed, "hold out"))
    if dataset.only is not None:
        kept = load_coreset(dataset.only, data.train, valid, dataset.name).indices.sort().values
    return Samples(data, kept, valid)


def augmentations(dataset: Dataset, data: Data) -> list[str]:
    """Return the augmentations asked for, or those that suit the data set."""
    return list(data.train.augment) if dataset.augment is None else list(dataset.augment)


def new_model(settings: Experiment, data: Data) -> nn.Module:
    """Build the experiment's model with weights drawn from its seed."""
    model = settings.model
    return build_model(model.name, data.train.shape, data.train.num_classes, seed=settings.seed, options=model.options)

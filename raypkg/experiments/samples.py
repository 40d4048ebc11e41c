"""Which samples a run trains on and which it holds out: the same in every process."""

from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import Dataset, Experiment, RunSettings
from raypkg.data import Data
from raypkg.data.coreset import Coreset
from raypkg.data.kinds import TEXTS
from raypkg.data.opening import open_data
from raypkg.data.partition import hold_out
from raypkg.models import build_model
from raypkg.models.classifier import Classifier
from raypkg.runs.storage import Storage

from .coreset_files import load_coreset, origin, save_coreset

ROWS = 16  # of a split, that its digest sees; the same however the samples are stored
LOOK = 512  # training samples that a new model may look at, labels apart
LOOKED_AT = 4  # blocks that they are in, where samples are read by blocks


class Samples(NamedTuple):
    """A data set with the training indices and the held-out ones, both positions in the training split."""

    data: Data
    train_indices: Tensor  # int64 [n], ascending
    held_out: Tensor  # int64 [v], ascending

    def digest(self, dataset: Dataset) -> str:
        """Return a digest of sizes and classes, of a few rows of each split, and of what ``dataset.only`` chose.

        It tells changes that happen, such as draws without a seed or a file that was replaced, not such as are made to
        deceive. What is held out is left out: settings may be run again with another seed.
        """
        digest = blake2b(digest_size=16)
        if dataset.only is not None:
            digest.update(self.train_indices.numpy().tobytes())
        for split in self.data:
            digest.update(repr((len(split), split.shape, split.classes)).encode())
            x, y = split.batch(split.spread(ROWS))
            digest.update(x.contiguous().numpy().tobytes())
            digest.update(y.numpy().tobytes())
            if split.ids is not None:  # they decide what is held out
                digest.update(split.ids.numpy().tobytes())
            if split.truth is not None:  # labels were drawn: all of them tell whether they still are the same
                digest.update(split.y.numpy().tobytes())
        return digest.hexdigest()

    @property
    def everyone(self) -> Coreset:
        """All training samples, unweighted."""
        return Coreset.uniform(self.train_indices)


def open_samples(settings: RunSettings) -> Samples:
    """Open a run's data set, once a process, and hold out its validation share, stratified, by the seed.

    Raises:
        UserError: the settings have a digest, and it is of other samples.
    """
    expected = settings.dataset.digest
    samples = open_any_samples(settings)
    if expected is not None and samples.digest(settings.dataset) != expected:
        raise UserError(
            f"dataset {settings.dataset.name!r} gives other samples than those the run began with: its files have"
            " changed, or its function draws without a seed"
        )
    return samples


def open_any_samples(settings: RunSettings) -> Samples:
    """Open a run's data set, whatever has become of its rows since."""
    dataset = settings.dataset.model_copy(update={"digest": None})
    return _opened(dataset.model_dump_json(), settings.seed)


def forget_samples() -> None:
    """Open data sets anew from now on: their files may have changed since the last run."""
    _opened.cache_clear()


@lru_cache(maxsize=2)
def _opened(dataset: str, seed: int) -> Samples:
    chosen = Dataset.model_validate_json(dataset)
    data = open_data(chosen, seed)
    train_indices, held_out = hold_out(data.train.y, chosen.validation, generator(seed, "hold out"), data.train.ids)
    if chosen.only is not None:
        given = load_coreset(chosen.only, data.train, held_out, chosen.name)
        train_indices = given.indices.sort().values
    return Samples(data, train_indices, held_out)


def check_same_tokens(here: Dataset, there: Dataset, data: Data, run: str) -> None:
    """Refuse texts whose tokens are not those that a model was trained on: the same numbers would be other words.

    Args:
        here: the data set that the model is to be given.
        there: that it was trained on.
        data: the first of them.
        run: that trained it.

    Raises:
        UserError: each learned a tokenizer from texts of its own, or they name different ones.
    """
    if data.train.kind is not TEXTS or (here.name, here.options) == (there.name, there.options):
        return
    own = here.options.get("tokenizer")
    if not own or own != there.options.get("tokenizer"):
        raise UserError(
            f"the texts of {here.name!r} are not cut into the tokens of run {run!r}, which trained on {there.name!r}:"
            " both need one dataset.options.tokenizer"
        )


def augmentations(dataset: Dataset, data: Data) -> list[str]:
    """Return the augmentations asked for, or those that suit the data set."""
    return list(data.train.augment) if dataset.augment is None else list(dataset.augment)


def new_model(settings: Experiment, data: Data) -> Classifier:
    """Build the experiment's model with weights drawn from its seed, prepared by a few hundred training inputs.

    Raises:
        UserError: it does not fit the data.
    """
    chosen = settings.model
    train = data.train
    model = build_model(chosen.name, train.shape, train.num_classes, seed=settings.seed, options=chosen.options)
    if model.is_prepared:
        x, _ = train.batch(train.spread(LOOK, blocks=LOOKED_AT).unique())
        model.prepare(train.inputs(x))
    return model


def given_coreset(settings: RunSettings, path: str, samples: Samples, storage: Storage, file: str) -> Coreset:
    """Copy a coreset into the run folder, unless an earlier attempt did, and return it.

    Args:
        settings: data set and seed of this run.
        path: of the coreset.
        samples: those that may be trained on.
        storage: the run folder.
        file: name of the copy.
    """
    split = samples.data.train
    if file in storage.list():
        return load_coreset(f"{storage.root}/{file}", split, samples.held_out, settings.dataset.name)
    coreset = load_coreset(path, split, samples.held_out, settings.dataset.name)
    save_coreset(storage, coreset, split, {**origin(settings), "source": path}, file=file)
    return coreset

"""The samples that a run trains on and those that it holds out: the same in every process. No torch at import."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from raypkg.core.config import dotted
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import Dataset, Experiment, RunSettings

if TYPE_CHECKING:
    from torch import Tensor

    from raypkg.data import Data
    from raypkg.data.coreset import Coreset
    from raypkg.data.split import Split
    from raypkg.engine.worker import Worker
    from raypkg.models.classifier import Classifier
    from raypkg.models.language import LanguageModel

ROWS = 16  # of a split, that its digest covers; the same however the samples are stored
LOOK = 512  # training samples, without labels, that prepare a new model
LOOKED_AT = 4  # blocks that they lie in, where samples are read by blocks
SAMPLES = "samples"  # their key in `worker.local`


class Samples(NamedTuple):
    """A data set with the training indices and the held-out ones, both positions in the training split."""

    data: Data
    train_indices: Tensor  # int64 [n], ascending
    held_out: Tensor  # int64 [v], ascending

    @classmethod
    def all_of(cls, split: Split) -> Samples:
        """Return a split of a script as training samples and test samples, none held out."""
        import torch

        from raypkg.data import Data

        return cls(Data(split, split), torch.arange(len(split)), torch.arange(0))

    def digest(self, dataset: Dataset) -> str:
        """Return a digest of sizes, classes, a few rows of each split, and the choice of ``dataset.only``.

        It detects a replaced file or a draw without a seed, not deliberate deception. The held-out set has no part in
        it: the settings may be run again with another seed.
        """
        digest = blake2b(digest_size=16)
        if dataset.only is not None:
            digest.update(self.train_indices.numpy().tobytes())
        for split in self.data:
            digest.update(repr((len(split), split.shape, split.classes)).encode())
            x, y = split.batch(split.spread(ROWS))
            digest.update(x.contiguous().numpy().tobytes())
            digest.update(y.numpy().tobytes())
            if split.ids is not None:  # they decide which samples are held out
                digest.update(split.ids.numpy().tobytes())
            if split.truth is not None:  # labels were drawn, so all of them count
                digest.update(split.y.numpy().tobytes())
        return digest.hexdigest()

    @property
    def everyone(self) -> Coreset:
        """All training samples, unweighted."""
        from raypkg.data.coreset import Coreset

        return Coreset.uniform(self.train_indices)


def open_samples(settings: RunSettings, *, verify: bool = True) -> Samples:
    """Open a run's data set, ``verify`` it by the digest in its settings, and hold out the validation share by seed."""
    from raypkg.data.opening import open_data
    from raypkg.data.split import hold_out

    chosen = settings.dataset
    data = open_data(chosen, settings.seed)
    rng = generator(settings.seed, "hold out")
    samples = Samples(data, *hold_out(data.train.y, chosen.validation, rng, data.train.ids))
    if chosen.only is not None:
        from .coreset_files import load_coreset

        samples = samples._replace(train_indices=load_coreset(chosen.only, samples, chosen).indices.sort().values)
    if verify and chosen.digest is not None and samples.digest(chosen) != chosen.digest:
        reason = "its files have changed, or its function draws without a seed"
        raise UserError(f"dataset {chosen.name!r} gives other samples than those the run began with: {reason}")
    return samples


def samples_on(worker: Worker, settings: RunSettings) -> Samples:
    """Return a run's samples on one of its workers, which opens them once for all phases."""
    if SAMPLES not in worker.local:
        worker.local[SAMPLES] = open_samples(settings)
    opened: Samples = worker.local[SAMPLES]
    return opened


def augmentations(dataset: Dataset, data: Data) -> list[str]:
    """Return the augmentations that the settings name, otherwise those that suit the data set."""
    return list(data.train.augment) if dataset.augment is None else list(dataset.augment)


def new_model(settings: Experiment, data: Data) -> Classifier | LanguageModel:
    """Build the experiment's model with weights drawn from its seed, prepared by a few hundred training inputs."""
    from raypkg.models import build_model
    from raypkg.models.classifier import Classifier

    chosen = settings.model
    train = data.train
    model = build_model(chosen.name, train.shape, train.num_classes, seed=settings.seed, options=chosen.options)
    if not isinstance(model, Classifier):
        _check_answers(settings, train)
    elif model.is_prepared:
        x, _ = train.batch(train.spread(LOOK, blocks=LOOKED_AT).unique())
        model.prepare(train.inputs(x))
    return model


def _check_answers(settings: Experiment, train: Split) -> None:
    """Refuse what does nothing in the training of a language model, and samples without an answer."""
    for name, value in dotted(settings.model_dump()).items():
        if value and name.endswith((".noise", ".label_smoothing", ".loss", ".metric")) and ".options." not in name:
            raise UserError(f"{name} = {value}: a language model has no logits and labels of classes")
    x, _ = train.batch(train.spread(LOOK, blocks=LOOKED_AT).unique())
    if not (x[:, 1, 1:] == 1).any(1).all():
        problem = "has texts without an answer, the only part that carries loss"
        raise UserError(f"dataset {settings.dataset.name!r} {problem}: a language model needs instructions:PATH")

"""A frozen model whose features stand for its samples: one by name, as it is built, or that of a finished run."""

from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.settings import Dataset, Model
from raypkg.coresets.gradients import evaluating
from raypkg.data import Data
from raypkg.data.augment import Augmentation
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.batches import ahead, loaders_of, training_batch
from raypkg.engine.loop import autocast
from raypkg.engine.worker import Worker
from raypkg.models import build_model
from raypkg.models.classifier import Classifier
from raypkg.runs.catalog import locate
from raypkg.runs.folder import RunFolder

from .samples import open_samples
from .trained import check_has_model, check_same_tokens, restored_model, settings_of_trained
from .training import MODEL

BATCH = {"cpu": 128, "cuda": 512}  # samples of a forward pass, whose sums are added in an order of their own


@dataclass(frozen=True)
class Backbone:
    """Features of a model, and how samples reach it; it travels as it is.

    Attributes:
        features: x [b, …] → h [b, D].
        width: D.
        mean: by which samples are normalised.
        std: likewise.
        precision: of the forward passes.
    """

    features: nn.Module
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str

    @classmethod
    def of(cls, model: Classifier, split: Split, precision: str) -> "Backbone":
        """Return the features of a model that takes samples as a split is normalised."""
        features = model.features.float()
        return cls(features, model.head.in_features, split.mean, split.std, precision)

    @property
    def digest(self) -> str:
        """A digest of what the features of a sample follow from, but the code: weights, normalisation, precision."""
        digest = blake2b(digest_size=16)
        digest.update(repr((self.width, self.mean, self.std, self.precision)).encode())
        for name, value in self.features.state_dict().items():
            digest.update(name.encode())
            digest.update(value.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device) -> "Backbone":
        """Return the backbone on a device, its weights in the memory layout that is fastest for images."""
        features = self.features.to(device).to(memory_format=torch.channels_last)
        return replace(self, features=features)

    def embed(
        self, split: Split, indices: Tensor, augment: Augmentation, draws: Tensor, device: torch.device
    ) -> Tensor:
        """Return the features of samples, float32 [n, D] on the processor.

        Args:
            split: where the samples are.
            indices: distinct positions, int64 [n].
            augment: what is done to each sample first.
            draws: uniform random numbers for it, [n, augment.draws].
            device: of the backbone.
        """
        normalised = replace(split, mean=self.mean, std=self.std)
        worker = Worker(device=device)

        def load(part: Tensor) -> Tensor:
            samples = Coreset.uniform(indices[part])
            return training_batch(normalised, samples, augment, draws[part], worker).x

        parts = torch.arange(len(indices)).split(BATCH[device.type])
        with evaluating(self.features), torch.inference_mode(), autocast(self.precision, device):
            loaded = ahead(load, parts, loaders_of(split))
            return torch.cat([self.features(x).float().cpu() for x in loaded])


def named_backbone(chosen: Model, data: Data, precision: str, seed: int) -> Backbone:
    """Return the features of a model as it is built, for samples normalised as it was trained with, if it says so.

    Otherwise samples are normalised by their own statistics.

    Args:
        chosen: its name and options.
        data: that it is for.
        precision: of the forward passes.
        seed: of whatever weights are drawn.

    Raises:
        UserError: there is no such model, it does not fit the data, or it is not of the form head(features(x)).
    """
    train = data.train
    model = build_model(chosen.name, train.shape, train.num_classes, seed=seed, options=chosen.options)
    if model.trained_with is not None:
        mean, std = model.trained_with
        train = replace(train, mean=mean, std=std)
    return Backbone.of(model, train, precision)


def trained_backbone(folder: RunFolder, run: str, dataset: Dataset, data: Data, precision: str) -> Backbone:
    """Return the features of the model that another run trained, for samples normalised as that run's were.

    Args:
        folder: of this run, among whose neighbours the other is looked for by name.
        run: its name or path.
        dataset: to embed.
        data: its samples.
        precision: of the forward passes.

    Raises:
        UserError: no such run, it is not finished or trained no model, its data cannot be had, or its samples have
            another shape or are cut into other tokens.
    """
    other = locate(folder.storage.parent.parent.root, run, having=MODEL)
    check_has_model(other)
    settings = settings_of_trained(other)
    theirs = open_samples(settings).data
    if theirs.train.shape != data.train.shape:
        shapes = f"{list(theirs.train.shape)}, those here have {list(data.train.shape)}"
        raise UserError(f"the model of run {other.name!r} takes samples of shape {shapes}")
    check_same_tokens(dataset, settings.dataset, data, other.name)
    model = restored_model(other, settings, theirs)
    return Backbone.of(model, theirs.train, precision)

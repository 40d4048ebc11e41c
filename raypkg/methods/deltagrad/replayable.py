"""Which trainings can be replayed."""

from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment
from raypkg.data.kinds import TEXTS
from raypkg.experiments.samples import augmentations, new_model, open_samples

from .objective import check_derivation


def check_replayable(settings: Experiment) -> None:
    """Refuse data and models that DeltaGrad's derivation does not cover.

    Raises:
        UserError: texts, augmentation, dropout, or batch norm.
    """
    data = open_samples(settings).data
    if data.train.kind is TEXTS:
        raise UserError(
            f"dataset {settings.dataset.name!r} holds texts: DeltaGrad takes images and rows, such as the features that"
            " `effray embed` makes of texts"
        )
    augment = augmentations(settings.dataset, data)
    if augment:
        raise UserError(
            f"dataset.augment = {','.join(augment)}: DeltaGrad replays exact gradients, so samples cannot be augmented"
        )
    check_derivation(new_model(settings, data), settings.model.name)

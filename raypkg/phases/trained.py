"""The model of a finished run, ready to predict."""

from pathlib import Path

import torch
from torch import Tensor

from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment
from raypkg.data import Data
from raypkg.data.kinds import kind_of
from raypkg.data.split import Split
from raypkg.engine.batches import dtype_of, to_device
from raypkg.models.classifier import Classifier
from raypkg.runs import ROOT
from raypkg.runs.checkpoints import load_tensors
from raypkg.runs.folder import RunFolder, locate

from .samples import new_model, open_samples
from .training import MODEL
from .trust import stored_settings


class TrainedClassifier(Classifier):
    """A trained model with what its inputs and outputs mean; called as it is, it takes normalised samples.

    Args:
        model: trained.
        split: that it was trained on, which gives classes and normalisation.
    """

    def __init__(self, model: Classifier, split: Split):
        super().__init__(model.features, model.head)
        self.classes = split.classes
        self.shape = split.shape
        self.mean = split.mean
        self.std = split.std

    @torch.inference_mode()
    def predict(self, x: Tensor) -> Tensor:
        """Return the labels of samples as they are stored, int64 [b]; ``classes`` has their names.

        Computes in the weights' precision, so a label can differ from one that was counted in bfloat16.

        Args:
            x: uint8 [b, C, H, W], float [b, D] or int64 [b, 2, l], as ``Split.batch`` gives them.

        Raises:
            UserError: another shape, or images that are not bytes: they would be scaled wrongly.
        """
        kind = kind_of(self.shape)
        if not isinstance(x, Tensor) or not kind.fits(x, self.shape):
            given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise UserError(f"predict takes {kind.form} as they are stored, of samples {self.shape}, not {given}")
        stored = to_device(x, self.head.weight.device)
        logits: Tensor = self(kind.inputs(stored, self.mean, self.std, dtype_of(self)))
        return logits.argmax(1)


def load_model(run: str | Path, root: str = ROOT) -> TrainedClassifier:
    """Return the trained model of a run, in evaluation mode.

    Args:
        run: path of its folder, or its name.
        root: of all runs, among which a name is looked for.

    Raises:
        UserError: no such run, it trained no model or is not finished, or its model's code has changed.

    >>> load_model("runs/lipt/none")
    Traceback (most recent call last):
    raypkg.core.errors.UserError: unknown run in runs 'runs/lipt/none'. Allowed: none
    """
    folder = locate(root, str(run))
    check_has_model(folder)
    settings = settings_of_trained(folder)
    data = open_samples(settings).data
    model = restored_model(folder, settings, data)
    return TrainedClassifier(model, data.train).eval()


def check_has_model(folder: RunFolder) -> None:
    """Refuse a run that has no model to use: only a finished one is known to be what its training ended with.

    Raises:
        UserError: the run is not finished or trained no model, or its file was changed.
    """
    if not folder.summary:
        raise UserError(f"run {folder.name!r} is not finished: it has no model yet")
    folder.check(MODEL)
    if MODEL not in folder.storage.list():
        raise UserError(f"run {folder.name!r} has no {MODEL}: it trained no model")


def settings_of_trained(folder: RunFolder) -> Experiment:
    """Return those settings of a run that every run with a model has.

    Raises:
        UserError: they are damaged, or name code of somebody else.
    """
    common = {name: part for name, part in stored_settings(folder).items() if name in Experiment.model_fields}
    return load_settings(Experiment, common)


def restored_model(folder: RunFolder, settings: Experiment, data: Data) -> Classifier:
    """Return the model of a finished run with its weights, in their precision.

    Raises:
        UserError: the run is not finished or trained no model, its file was changed, or its model's code has changed.
    """
    check_has_model(folder)
    state = load_tensors(folder.storage, MODEL)
    model = new_model(settings, data)
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise UserError(
            f"{folder.storage.root}/{MODEL} does not fit model {settings.model.name!r}: its code changed"
        ) from None
    return model.to(state["head.weight"].dtype)

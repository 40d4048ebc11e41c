"""The model of a finished run, ready to predict."""

from pathlib import Path

import torch
from torch import Tensor

from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.settings import Dataset, Experiment, RunSettings, Train
from raypkg.data import Data
from raypkg.data.kinds import TEXTS, kind_of
from raypkg.data.split import Split
from raypkg.engine.batches import dtype_of, to_device
from raypkg.models.classifier import Classifier
from raypkg.runs import ROOT
from raypkg.runs.catalog import locate
from raypkg.runs.checkpoints import load_tensors, save_tensors
from raypkg.runs.folder import RunFolder
from raypkg.runs.storage import Storage

from .first_weights import FIRST, fitted
from .samples import Samples, new_model, open_samples
from .training import MODEL
from .trust import stored_settings

WEIGHTS = ".safetensors"


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

    >>> load_model("none", root="no/runs/yet")
    Traceback (most recent call last):
    raypkg.core.errors.UserError: unknown run in no/runs/yet 'none'. Allowed: none
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


def keep_first_weights(settings: RunSettings, samples: Samples, folder: RunFolder) -> None:
    """Copy the weights that training is to begin with into the run folder, unless an earlier attempt did.

    Raises:
        UserError: there are none, or they do not fit the model.
    """
    place, _, file = FIRST.rpartition("/")
    if folder.started or file in folder.storage.list(place):
        return
    if tensors := first_weights(settings, samples, folder.storage.parent.parent.root):
        save_tensors(folder.storage, FIRST, tensors)


def first_weights(settings: RunSettings, samples: Samples, root: str) -> dict[str, Tensor]:
    """Return the weights that training is to begin with, none where they are drawn from the seed.

    Args:
        settings: of the run.
        samples: of the run.
        root: folder of all runs, among which a name is looked up.

    Raises:
        UserError: there is no such file or run, the run has no model or its file was changed, or nothing in it fits.
    """
    train = getattr(settings, "train", None)
    if not (isinstance(settings, Experiment) and isinstance(train, Train) and train.from_ is not None):
        return {}
    data = samples.data
    storage, file = Storage.around(train.from_)
    if not file.endswith(WEIGHTS):
        run = locate(root, train.from_, having=MODEL)
        check_has_model(run)
        _check_suits(run, settings, data)
        storage, file = run.storage, MODEL
    elif file not in storage.list():
        raise UserError(f"train.from: there is no file {train.from_}")
    tensors = load_tensors(storage, file)
    model = new_model(settings, data)
    fitted(model, tensors, train.from_)
    return tensors


def _check_suits(run: RunFolder, settings: Experiment, data: Data) -> None:
    """Refuse a run that trained on what is held out here, or on texts of other tokens."""
    theirs = settings_of_trained(run)
    check_same_tokens(settings.dataset, theirs.dataset, data, run.name)
    here, there = settings.dataset, theirs.dataset
    same_data = (here.name, here.options) == (there.name, there.options)
    held_out_there = (theirs.seed, there.validation)
    if same_data and here.validation and held_out_there != (settings.seed, here.validation):
        raise UserError(
            f"train.from = {run.name}: it trained on samples that are held out here: its seed is {theirs.seed} and its"
            f" dataset.validation {there.validation:g}, here they are {settings.seed} and {here.validation:g}"
        )


def check_same_tokens(here: Dataset, there: Dataset, data: Data, run: str) -> None:
    """Refuse texts whose tokens differ from those that a model was trained on: the same numbers would be other words.

    Args:
        here: the data set for the model.
        there: the one that it was trained on.
        data: the samples of the first.
        run: name of the run that trained it.

    Raises:
        UserError: each learned a tokenizer from its own texts, or they name different ones.
    """
    if data.train.kind is not TEXTS or (here.name, here.options) == (there.name, there.options):
        return
    own = here.options.get("tokenizer")
    if not own or own != there.options.get("tokenizer"):
        raise UserError(
            f"the texts of {here.name!r} are not cut into the tokens of run {run!r}, which trained on {there.name!r}:"
            " both need one dataset.options.tokenizer"
        )


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

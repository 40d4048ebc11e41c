"""Models of finished runs: to predict with, and to begin another training with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from raypkg.core.config import load_settings
from raypkg.core.errors import UserError, shown
from raypkg.core.registry import extra
from raypkg.core.settings import Dataset, Experiment, RunSettings, Train
from raypkg.data import Data
from raypkg.data.kinds import IMAGES, TEXTS, kind_of
from raypkg.data.split import Split
from raypkg.data.tokenizer import encode, padded, tokenizer_at
from raypkg.engine.batches import dtype_of, to_device
from raypkg.engine.loop import output_of
from raypkg.engine.run import Hook, Results, Run
from raypkg.models.classifier import Classifier
from raypkg.runs import ROOT
from raypkg.runs.checkpoints import load_tensors, save_tensors
from raypkg.runs.folder import CONFIG, MODEL, RunFolder
from raypkg.runs.storage import Storage

from .resolve import stored_settings
from .samples import Samples, new_model, open_samples

if TYPE_CHECKING:
    from raypkg.models.language import LanguageModel

WEIGHTS = ".safetensors"
FIRST = "checkpoints/first.safetensors"  # of an unfinished run: its source may change or be deleted
HEAD = "head."  # prefix of the last layer's parameters
NAMED = 3  # names that a message lists


class Predictions(NamedTuple):
    """The likeliest class of each sample."""

    labels: Tensor  # int64 [b]
    probabilities: Tensor  # of all classes, the softmax of the logits, [b, C]
    names: list[str]  # of the labels


class TrainedClassifier(Classifier):
    """A trained model with the meaning of its inputs and outputs; called directly, it takes normalised samples.

    >>> from raypkg.models import build_model
    >>> split = Split.from_tensors(torch.eye(2), torch.arange(2), classes=["left", "right"])
    >>> linear = build_model("linear", split.shape, split.num_classes, seed=0)
    >>> TrainedClassifier(linear, split).predict([[0.0, 1.0], [1.0, 0.0]]).probabilities.shape
    torch.Size([2, 2])
    """

    def __init__(self, model: Classifier, split: Split, tokenizer: str = ""):
        super().__init__(model.features, model.head)
        self.classes = split.classes
        self.shape = split.shape
        self.mean = split.mean
        self.std = split.std
        self.columns = split.columns
        self._trained_tokenizer = split.tokenizer
        self._named_tokenizer = tokenizer

    @cached_property
    def tokenizer(self) -> Any:
        """The ``tokenizers.Tokenizer`` of the training texts."""
        if self._named_tokenizer:
            return tokenizer_at(self._named_tokenizer)
        if not self._trained_tokenizer:
            raise UserError("the model was trained on tokens whose tokenizer is unknown: predict takes such tokens")
        return extra("tokenizers", "text", "predict").Tokenizer.from_str(self._trained_tokenizer)

    @torch.inference_mode()
    def predict(self, samples: Any, *, views: str = "plain") -> Predictions:
        """Return labels, probabilities and class names of samples as they come, or as they are stored.

        Computes in the weights' precision, so a label can differ from one that was counted in bfloat16.

        Args:
            samples: a list of texts or of pairs, of Pillow's images, or of rows of numbers; images are brought to the
                size and colours of training. Or a tensor as ``Split.batch`` returns it: uint8 [b, C, H, W],
                float [b, D] or int64 [b, 2, l].
            views: of images, over which logits are averaged, as ``train.evaluate_views``: plain, mirrored or shifted.

        Raises:
            UserError: another kind or shape, images that are not bytes, which would be scaled wrongly, or a model
                whose outputs are NaN or infinite.
        """
        kind = kind_of(self.shape)
        x = samples
        if not isinstance(samples, str | Tensor):
            with suppress(TypeError, ValueError, AttributeError):  # refused below
                if kind is TEXTS:
                    x = torch.from_numpy(padded(encode(self.tokenizer, samples, self.shape[0])[0]))
                elif kind is IMAGES:
                    from raypkg.data.store.images import pixels_of  # training needs no decoder of images

                    x = kind.tensor(np.stack([pixels_of(image, self.shape) for image in samples]))
                else:
                    x = torch.from_numpy(np.asarray(samples, np.float32))
        if not isinstance(x, Tensor) or not kind.fits(x, self.shape):
            given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else shown(samples)
            takes = f"{kind.form} as they are stored, or {kind.raw}"
            raise UserError(f"predict takes {takes}, of samples {self.shape}, not {given}")
        stored = to_device(x, self.head.weight.device)
        logits: Tensor = output_of(self, kind.inputs(stored, self.mean, self.std, dtype_of(self)), views)
        if not logits.isfinite().all():
            raise UserError("predict: the model's outputs are not finite numbers: its training diverged")
        labels = logits.argmax(1)
        return Predictions(labels, logits.softmax(1), [self.classes[label] for label in labels.tolist()])


def load_model(run: str | Path, root: str = ROOT) -> TrainedClassifier | LanguageModel:
    """Return the trained model of a run, in evaluation mode; a language model as it was trained.

    A language model's ``network`` is that of transformers, or of peft around it: ``model.network.generate(…)``.

    Args:
        run: path of its folder, or its name.
        root: folder of all runs, among which a name is looked up.

    Raises:
        UserError: no such run, it trained no model or is not finished, or its model's code has changed.

    >>> load_model("none", root="no/runs/yet")
    Traceback (most recent call last):
    raypkg.core.errors.UserError: unknown run in no/runs/yet 'none'. Allowed: none
    """
    from raypkg.runs.catalog import locate

    return model_and_data(locate(root, str(run), having=MODEL))[0]


def model_and_data(folder: RunFolder) -> tuple[TrainedClassifier | LanguageModel, Data, Experiment]:
    """Return the trained model of a run, in evaluation mode, its data set and its settings."""
    settings = settings_of_trained(folder)
    data = open_samples(settings).data
    model = restored_model(folder, settings, data)
    if isinstance(model, Classifier):
        model = TrainedClassifier(model, data.train, settings.dataset.options.get("tokenizer", ""))
    return model.eval(), data, settings


def settings_of_trained(folder: RunFolder, reader: str = "") -> Experiment:
    """Return the settings that all trained runs have; a ``reader`` of gradients refuses a model of another loss."""
    if not folder.summary:
        raise UserError(f"run {folder.name!r} is not finished: it has no model yet")
    folder.check(MODEL)
    if MODEL not in folder.storage.list():
        raise UserError(f"run {folder.name!r} has no {MODEL}: it trained no model")
    stored = stored_settings(folder)
    if reader and (loss := stored.get("train", {}).get("loss")):
        raise UserError(f"run {folder.name} has train.loss = {loss}, {reader} goes by the cross-entropy")
    common = {name: part for name, part in stored.items() if name in Experiment.model_fields}
    return load_settings(Experiment, common)


def restored_model(folder: RunFolder, settings: Experiment, data: Data) -> Classifier | LanguageModel:
    """Return the model of a finished run with its weights, in their precision; refuse one whose code has changed."""
    state = load_tensors(folder.storage, MODEL)
    model = new_model(settings, data)
    try:
        model.load_state_dict(state)
    except RuntimeError:
        file = f"{folder.storage.root}/{MODEL}"
        raise UserError(f"{file} does not fit model {settings.model.name!r}: its code changed") from None
    return model.to(next(value.dtype for value in state.values() if value.is_floating_point()))


def check_same_tokens(here: Dataset, there: Dataset, data: Data, run: str) -> None:
    """Refuse texts whose tokens differ from those of a run's training: the same numbers would be other words."""
    if data.train.kind is not TEXTS or (here.name, here.options) == (there.name, there.options):
        return
    own = here.options.get("tokenizer")
    if not own or own != there.options.get("tokenizer"):
        problem = f"the texts of {here.name!r} are not cut into the tokens of run {run!r}, trained on {there.name!r}"
        raise UserError(f"{problem}: both need one dataset.options.tokenizer")


# First weights of a training: another run's model, or a file


def keep_first_weights(settings: RunSettings, samples: Samples, folder: RunFolder) -> None:
    """Copy the first weights of training into the run folder, unless an earlier attempt did."""
    place, _, file = FIRST.rpartition("/")
    if folder.started or file in folder.storage.list(place):
        return
    if tensors := first_weights(settings, samples, folder.storage.parent.parent.root):
        save_tensors(folder.storage, FIRST, tensors)


def first_weights(settings: RunSettings, samples: Samples, root: str) -> dict[str, Tensor]:
    """Return the first weights that the settings name, or none if they are drawn from the seed."""
    train = getattr(settings, "train", None)
    if not (isinstance(settings, Experiment) and isinstance(train, Train) and train.from_ is not None):
        return {}
    storage, file = Storage.around(train.from_)
    if not file.endswith(WEIGHTS):
        from raypkg.runs.catalog import locate

        run = locate(root, train.from_, having=MODEL)
        theirs = settings_of_trained(run)
        here, there = settings.dataset, theirs.dataset
        check_same_tokens(here, there, samples.data, run.name)
        same_data = (here.name, here.options) == (there.name, there.options)
        if same_data and here.validation and (theirs.seed, there.validation) != (settings.seed, here.validation):
            seeds = f"its seed is {theirs.seed} and its dataset.validation {there.validation:g}"
            ours = f"here they are {settings.seed} and {here.validation:g}"
            raise UserError(f"train.from = {run.name}: it trained on samples that are held out here: {seeds}, {ours}")
        storage, file = run.storage, MODEL
    elif file not in storage.list():
        raise UserError(f"train.from: there is no file {train.from_}")
    elif CONFIG in storage.list():
        RunFolder(storage).check(file)
    tensors = load_tensors(storage, file)
    fitted(new_model(settings, samples.data), tensors, train.from_)
    return tensors


def fitted(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], str]:
    """Match tensors to a model by name and shape; return those that fit, and a line about them.

    A head for another number of classes is drawn at random. Refuse tensors if only a head fits, or if a shape differs
    elsewhere.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    >>> taken, line = fitted(model, {"0.weight": model[0].weight, "other": model[0].bias}, "a.safetensors")
    >>> list(taken), line.partition("; ")[2]
    (['0.weight'], 'drawn anew: 0.bias, 1.weight, 1.bias; without a place here: other')
    """
    own = model.state_dict()
    shared = [name for name in own if name in tensors]
    taken = {name: tensors[name] for name in shared if tensors[name].shape == own[name].shape}
    resized = [name for name in shared if name not in taken]
    differing = [n for n in resized if not n.startswith(HEAD) or own[n].shape[1:] != tensors[n].shape[1:]]
    features = [name for name in own if not name.startswith(HEAD)] or list(own)
    if set(features).isdisjoint(shared) or not (taken or differing):
        names = f"there it has {_some(list(tensors))}, here {_some(list(own))}"
        raise UserError(f"train.from = {source}: no tensor fits this model: {names}")
    if differing:
        name = differing[0]
        there, here = list(tensors[name].shape), list(own[name].shape)
        raise UserError(f"train.from = {source}: {name} is {there} there and {here} in this model")
    line = f"first weights: {len(taken)} tensors from {source}"
    if anew := [name for name in own if name not in taken]:
        line += f"; drawn anew: {_some(anew)}"
    if unused := [name for name in tensors if name not in own]:
        line += f"; without a place here: {_some(unused)}"
    return taken, line


class FirstWeights(Hook):
    """Begins with the weights of another training."""

    priority = -10  # before first masks are drawn, which may depend on the weights
    sharded = True  # it acts before they are

    def __init__(self, tensors: Mapping[str, Tensor], source: str):
        self.tensors = tensors
        self.source = source

    def on_start(self, run: Run) -> None:
        """Overwrite the weights that fit."""
        taken, self.finding = fitted(run.model, self.tensors, self.source)
        run.model.load_state_dict(taken, strict=False)
        self.tensors = {}  # no longer needed

    def results(self, run: Run) -> Results:
        """Return the line about the weights."""
        return Results(findings=[self.finding])


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(names[:NAMED]) or "none"
    return f"{listed} and {len(names) - NAMED} more" if len(names) > NAMED else listed

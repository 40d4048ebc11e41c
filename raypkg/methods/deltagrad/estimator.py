"""DeltaGrad in a script of one's own: an estimator in scikit-learn's manner, over a recorded run."""

import inspect
import math
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from raypkg.core.config import validate
from raypkg.core.errors import UserError, unknown
from raypkg.data.opening import normalisation
from raypkg.data.split import Split, as_array
from raypkg.engine.loop import fit as train
from raypkg.engine.run import Run
from raypkg.experiments.samples import Samples, new_model
from raypkg.runs.checkpoints import load_tensors, save_tensors
from raypkg.runs.folder import CONFIG, LOG, MODEL, RunFolder
from raypkg.runs.storage import PART, Storage

from .answer import answer, verify
from .history import HistoryWriter, Layout, check_room, history_folder
from .hook import Historian
from .journal import Change
from .linearised import Linearised
from .objective import to_vector
from .requests import Request, change_of
from .run import BATCHES, RecordedRun, begin_journal, open_recorded
from .settings import DeltaGradSettings, Holders, RequestSettings

LEFT_BEHIND = {"versions", "added", MODEL, CONFIG, BATCHES}  # by a training that was killed
PARTS = {  # the constructor's arguments among the settings of `effray deltagrad train`
    "dataset": ("scale",),
    "train": ("epochs", "batch_size", "lr", "weight_decay", "schedule", "milestones", "lr_drop"),
    "replay": ("period", "burn_in", "pairs"),
}


class InvalidInput(UserError, ValueError):
    """Invalid data or ids, as scikit-learn expects it: a ``ValueError``."""


@contextmanager
def _value_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if isinstance(error, ValueError):
            raise
        raise InvalidInput(str(error)) from None


class DeltaGrad:
    """Multinomial logistic regression that unlearns and learns samples without retraining.

    ``fit`` minimises F(w) = 1/n Σ_i −log softmax(W z_i + b)[y_i] + λ/2 ‖w‖² by SGD in float64, w ← w − η_t (g_t + λw).
    Here w = (W, b), and z are the scaled samples. It records w_t and the mean loss gradient g_t of every step.
    ``delete`` and ``add`` replay these steps with other samples and take most gradients from the record, corrected by
    an L-BFGS approximation of the Hessian (DeltaGrad, arXiv:2006.14755, algorithms 1 and 3; see `replay`).

    The training is that of `effray deltagrad train`: same settings and threads, same weights. It is an estimator of
    scikit-learn, which it does not need. An id is a row number of ``fit``; added samples continue them, and an id is
    never used twice. A small distance from retraining is no formal guarantee of deletion.

    Args:
        epochs: passes over the samples.
        batch_size: samples per step; large ones keep the record of 2 · steps · parameters numbers small.
        lr: learning rate η at the start.
        weight_decay: λ.
        schedule: multistep, constant, cosine or linear.
        milestones: shares of training at which multistep multiplies the rate by ``lr_drop``.
        lr_drop: factor of the rate at each milestone.
        scale: of the columns: "unit" (in [0, 1]), "standard" or "none"; by the samples of ``fit``.
        period: T0: every T0-th step of a replay is exact; 1 = all.
        burn_in: j0: exact steps at the start; None = 20, at most a third of the steps.
        pairs: m: pairs in the approximation of the Hessian.
        seed: of the first weights and the batches.
        history: new local folder for the record and the samples, in which every change is durable; None = a temporary
            folder, deleted with the object.

    Raises:
        UserError: a ``ValueError`` too: invalid settings, samples, labels or ids. The state is as before.

    >>> x = np.random.default_rng(0).normal(size=(90, 4))
    >>> y = np.where(x[:, 0] > 0, "yes", "no")
    >>> model = DeltaGrad(epochs=20, batch_size=30, lr=1.0).fit(x, y).delete([3, 14, 15])
    >>> model.score(x, y) > 0.9, model.add(x[3:5], y[3:5])
    (True, array([90, 91]))
    >>> model.verify() < 0.03
    True
    """

    history: str | os.PathLike[str] | None
    _prepared: Linearised | None

    def __init__(
        self,
        *,
        epochs: int = 20,
        batch_size: int = 16384,
        lr: float = 0.1,
        weight_decay: float = 1e-4,
        schedule: str = "multistep",
        milestones: tuple[float, ...] = (0.5,),
        lr_drop: float = 0.5,
        scale: str = "unit",
        period: int = 5,
        burn_in: int | None = None,
        pairs: int = 2,
        seed: int = 0,
        history: str | os.PathLike[str] | None = None,
    ):
        arguments = dict(locals())
        del arguments["self"]
        vars(self).update(arguments)  # unchanged and under their names, as scikit-learn requires

    # Training and prediction

    @_value_errors()
    def fit(self, X: Any, y: Any) -> Self:
        """Train from the start and record every step.

        Args:
            X: [n, D], or uint8 images [n, C, H, W]: NumPy, PyTorch or an Arrow table; used as float32.
            y: labels, [n]: texts, integers, whole floats or booleans.
        """
        settings = self._settings()
        x = _numbers(X)
        classes, codes = np.unique(_labels(y, len(x)), return_inverse=True)
        if len(classes) < 2:
            raise UserError(f"y has one class, {str(classes[0])!r}: at least 2 are needed")
        split = Split.from_tensors(x, codes, [str(code) for code in range(len(classes))])
        mean, std = normalisation(split, settings.dataset.scale)
        split = replace(split, mean=mean, std=std)
        samples = Samples.all_of(split)
        model = new_model(settings, samples.data)
        folder = new_folder(self.history)
        place = history_folder(folder.storage, 0)
        layout = Layout.of(model, settings.history.dtype)
        check_room(place, layout, settings.steps(len(split)))
        with closing(HistoryWriter(place, layout)) as writer:
            hooks = [Historian(writer)]
            train(Run.simple(model, split, settings.train, hooks=hooks, seed=settings.seed, augment=()))
            sealed = writer.seal(to_vector(model.parameters()))
        save_tensors(folder.storage, MODEL, model.state_dict())
        begin_journal(folder, settings, samples, sealed, classes)
        return self._open(folder)

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable label of each sample, [n]."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    @property
    def coef_(self) -> np.ndarray:
        """W, of the scaled samples, float64 [C, D]."""
        return load_tensors(self._fitted().storage, MODEL)["head.weight"].numpy()

    @property
    def intercept_(self) -> np.ndarray:
        """b, float64 [C]."""
        return load_tensors(self._fitted().storage, MODEL)["head.bias"].numpy()

    @_value_errors()
    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each of ``classes_``, float64 [n, C]."""
        run = self._fitted()
        x = _numbers(X)
        split = self._aligned(x, np.zeros(len(x), np.int64))
        return run.objective.logits(split, run.weights(), torch.arange(len(split))).softmax(1).numpy()

    @_value_errors()
    def score(self, X: Any, y: Any) -> float:
        """Return the accuracy on samples X with labels y."""
        predicted = self.predict(X)
        return float((predicted == _labels(y, len(predicted))).mean())

    # Deletions and additions

    @_value_errors()
    def delete(self, ids: Any) -> Self:
        """Update the model as if some samples had not been in its training.

        Args:
            ids: integers, [m]; each in use, none twice. A sample of every class must stay.
        """
        run = self._fitted()
        self._answer(run, change_of(run, [Request("delete", row_numbers(ids).tolist())]))
        return self

    @_value_errors()
    def approximate(self, ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return ``coef_`` and ``intercept_`` about as ``delete`` would set them, within milliseconds; change nothing.

        The linearised training, see `linearised`: ours, not the paper's. The first call after a change of the model
        takes longer: it prepares a factor of the Hessian. Models of more than 2,048 parameters are refused.
        """
        run = self._fitted()
        change = change_of(run, [Request("delete", row_numbers(ids).tolist())])
        if self._prepared is None:
            used = run.active.nonzero()[:, 0]
            self._prepared = Linearised(run.objective, run.split, run.history(), used, run.settings.train.weight_decay)
        w = run.weights() + self._prepared.change((change.before & ~change.now).nonzero()[:, 0])
        classes = len(self.classes_)
        return w[:-classes].view(classes, -1).numpy(), w[-classes:].numpy()

    @_value_errors()
    def add(self, X: Any, y: Any) -> np.ndarray:
        """Update the model as if further samples had been in its training, in a random batch of each epoch.

        Args:
            X: [m, D], as for ``fit``; scaled as its samples.
            y: labels among ``classes_``, [m].

        Returns:
            The ids of the samples, int64 [m].
        """
        run = self._fitted()
        if run.batches:
            raise UserError(
                "add: another loop than DeltaGrad's chose the batches, which have no place for more samples"
            )
        x = _numbers(X)
        labels = _labels(y, len(x))
        codes = {label: code for code, label in enumerate(self.classes_.tolist())}
        for label in labels.tolist():
            if label not in codes:
                raise unknown("class", str(label), map(str, self.classes_))
        new = self._aligned(x, np.array([codes[label] for label in labels.tolist()]))
        first = len(run.active)
        in_use = torch.cat([run.active, torch.ones(len(new), dtype=torch.bool)])
        self._answer(run, Change(before=in_use, now=in_use, new=new, requests=()))
        return np.arange(first, first + len(new))

    @_value_errors()
    def verify(self) -> float:
        """Return the distance ‖w − w_retrained‖ from the weights of training from scratch with the samples in use."""
        run = self._fitted()
        return verify(run, Holders(cpus_per_worker=torch.get_num_threads())).distance

    # Folders

    @_value_errors()
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Copy model, record and samples to a new local folder, as ``history`` would hold them."""
        run = self._fitted()
        place = Path(folder)
        unfinished = place.with_name(f"{place.name}{PART}")
        if place.exists():
            raise UserError(f"{str(folder)!r} exists: save to a new folder")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        with run.exclusively():
            shutil.copytree(run.storage.root, unfinished)
        unfinished.rename(place)

    @classmethod
    @_value_errors()
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Open a folder of ``save`` or ``history``; further changes are made durable there.

        A folder whose process was killed while it changed has the old or the new state.
        """
        model = cls(history=folder)._open(RunFolder(Storage(str(folder))))
        settings = model._run.settings
        values = {name: getattr(getattr(settings, part), name) for part, names in PARTS.items() for name in names}
        return model.set_params(seed=settings.seed, **values)

    def _open(self, folder: RunFolder) -> Self:
        root = folder.storage.root
        if not folder.storage.read(LOG):
            raise UserError(f"{root!r} holds no complete record of DeltaGrad: it does not exist or has no {LOG}")
        with open_recorded(folder) as run:
            first = run.journal.entries[0]
        if "labels" not in first:
            raise UserError(f"{root} is a run of `effray deltagrad train`: use its commands")
        self._run = run
        self._prepared = None
        self.classes_ = np.array(first["labels"], np.dtype(first["dtype"]))  # sorted, [C]
        self.n_features_in_ = math.prod(run.samples.data.train.shape)  # D
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the arguments, and all files: a copy has a temporary folder of its own."""
        state = vars(self).copy()
        state.pop("_prepared", None)
        if run := state.pop("_run", None):
            root = Path(run.storage.root)
            state["_files"] = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*")}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        files = state.pop("_files", None)
        vars(self).update(state)
        if files:
            folder = new_folder(None)
            for name, content in files.items():
                folder.storage.write(name, content)
            self._open(folder)

    # Requests

    def _fitted(self) -> RecordedRun:
        if hasattr(self, "_run"):
            return self._run
        theirs = sys.modules.get("sklearn.exceptions")
        kinds = (UserError, theirs.NotFittedError) if theirs else (UserError, ValueError, AttributeError)
        raise type("NotFittedError", kinds, {})("this DeltaGrad has not been trained: call fit, or load a folder")

    def _aligned(self, x: np.ndarray, codes: np.ndarray) -> Split:
        """Return samples scaled as those of ``fit``."""
        like = self._fitted().samples.data.train
        if x.shape[1:] != like.shape:
            given, needed = math.prod(x.shape[1:]), math.prod(like.shape)
            raise UserError(f"X has {given} features, but DeltaGrad is expecting {needed} features as input")
        return replace(Split.from_tensors(x, codes, like.classes), mean=like.mean, std=like.std)

    def _answer(self, run: RecordedRun, change: Change) -> None:
        here = Holders(cpus_per_worker=torch.get_num_threads())
        settings = RequestSettings(replay=self._settings().replay, cluster=here)
        try:
            self._prepared = None
            with run.exclusively():
                answer(run, change, settings)
        except BaseException:  # also Ctrl-C
            with suppress(UserError):
                self._open(run.folder)  # the old state or the new one
            raise

    # Parameters, in scikit-learn's manner

    def _settings(self) -> DeltaGradSettings:
        values = {name: value.item() if isinstance(value, np.generic) else value for name, value in vars(self).items()}
        parts = {part: {name: values[name] for name in names} for part, names in PARTS.items()}
        return validate(DeltaGradSettings, {**parts, "seed": values["seed"]})

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's arguments by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> Self:
        """Set some of the constructor's arguments; those of training take effect with the next ``fit``."""
        for name, value in params.items():
            if name not in self.get_params():
                raise InvalidInput(str(unknown("parameter", name, self.get_params())))
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags  # the caller has imported it

        return Tags("classifier", TargetTags(required=True), None, ClassifierTags(), None, input_tags=InputTags())


def new_folder(history: str | os.PathLike[str] | None) -> RunFolder:
    """Create the folder of a record, or a temporary one that is deleted with the result; refuse a used folder."""
    storage = Storage(tempfile.mkdtemp(prefix="deltagrad-") if history is None else str(history))
    if set(storage.list()) - LEFT_BEHIND:
        raise UserError(f"{storage.root!r} holds a record or other files: load it, or choose a new folder")
    if storage.local:  # others are refused by `history_folder`
        storage.claim()
    folder = RunFolder(storage)
    if history is None:
        weakref.finalize(folder, shutil.rmtree, storage.root, ignore_errors=True)
    return folder


# Data


def row_numbers(ids: Any) -> np.ndarray:
    """Return ids as int64 [m]; refuse other types and shapes, and none."""
    numbers = np.atleast_1d(as_array(ids))
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not len(numbers) or numbers.max() >= 2**63:
        raise UserError(
            f"ids are {numbers.dtype} {list(numbers.shape)}, needed are integers [m], at least one, below 2⁶³"
        )
    return numbers.astype(np.int64)


def _numbers(X: Any) -> np.ndarray:
    """Return samples as floats [n, D] or uint8 [n, C, H, W]."""
    if hasattr(X, "toarray"):
        raise UserError(f"X is sparse ({type(X).__name__}): DeltaGrad takes dense samples, X.toarray()")
    x = as_array(X)
    if x.dtype.kind == "c":
        raise UserError(f"X is {x.dtype}. Complex data not supported")
    if x.dtype == np.uint8 and x.ndim == 4:
        return x
    if x.ndim != 2:
        raise UserError(f"X has shape {list(x.shape)}, needed is [n, D]. Reshape your data")
    if not x.size:
        what = "sample" if x.shape[1] else "feature"
        raise UserError(f"0 {what}(s) (shape={x.shape}) while a minimum of 1 is required.")
    return x if x.dtype.kind == "f" else x.astype(np.float64)


def _labels(y: Any, n: int) -> np.ndarray:
    """Return labels [n]; refuse continuous ones, and types that the log cannot keep."""
    if y is None:
        raise UserError("DeltaGrad requires y to be passed, but the target y is None")
    labels = as_array(y)
    if labels.shape == (n, 1):
        labels = labels[:, 0]
    if labels.shape != (n,):
        raise UserError(f"y has shape {list(labels.shape)}, needed are {n} labels, [{n}]")
    kinds = {type(label) for label in labels.tolist()}
    if len(kinds) > 1 or not kinds <= {str, int, float, bool}:  # of which the log can keep the classes
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(f"Unknown label type: {names}. Labels are texts, integers, whole floats or booleans, all alike")
    if kinds == {float}:
        labels = labels.astype(np.float64)
        if not np.isfinite(labels).all():
            raise UserError("Input y contains NaN or infinity")
        if (labels != labels.round()).any():
            raise UserError(f"Unknown label type: continuous. y holds {labels[labels != labels.round()][0]}")
    return labels

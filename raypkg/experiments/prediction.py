"""Predictions of a finished run's classifier: for samples in files as they come, and for a split with known labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import torch
from torch import Tensor

from raypkg.core.errors import UserError, unknown
from raypkg.core.settings import Dataset, Experiment
from raypkg.data import Data
from raypkg.data.files import files_below, place_of
from raypkg.data.kinds import IMAGES, TEXTS, kind_of
from raypkg.data.opening import open_data
from raypkg.data.split import Split
from raypkg.runs.folder import RunFolder
from raypkg.runs.storage import Storage

from .trained import TrainedClassifier, check_same_tokens, model_and_data, settings_of_trained

BATCH = 256  # samples of a forward pass
BINS = 15  # of the calibration error
CONFIDENT = 1.96  # standard deviations of a 95 % interval
FORMATS = (".parquet", ".csv", ".jsonl")


def trained_classifier(folder: RunFolder) -> tuple[TrainedClassifier, Data, Experiment]:
    """Return model, data and settings of a run; refuse a language model, whose outputs are no classes."""
    model, data, settings = model_and_data(folder)
    if not isinstance(model, TrainedClassifier):
        raise UserError(f"run {folder.name!r} trained a language model: load it with raypkg.load_model")
    return model, data, settings


# New samples


def predictions_of(folder: RunFolder, source: str) -> pa.Table:
    """Return the input, likeliest class and probabilities of each sample of a source, a row each.

    ``source`` is an image file or a folder of them; a file of texts (``.txt``, a line each, or the formats of
    ``text:PATH``); or a file of rows (parquet or CSV with the columns of training). No labels are needed.

    Raises:
        UserError: nothing to read there, unreadable files, columns of training that are missing.
    """
    model, data, settings = trained_classifier(folder)
    names: list[Any] = []
    parts = []
    for inputs, samples in _batches(model, data.train, source, settings.dataset.options):
        names += inputs
        parts.append(model.predict(samples).probabilities)
    if not parts:
        raise UserError(f"{source!r} holds no samples")
    return table_of(names, torch.cat(parts), model.classes)


def table_of(names: Sequence[Any], probabilities: Tensor, classes: Sequence[str]) -> pa.Table:
    """Return predictions as a table: input, label, probability, and a column ``p(class)`` for each class."""
    best, labels = probabilities.float().max(1)
    chosen = [classes[label] for label in labels.tolist()]
    of_each = {f"p({name})": column.numpy() for name, column in zip(classes, probabilities.T.float(), strict=True)}
    return pa.table({"input": pa.array(names), "label": chosen, "probability": best.numpy(), **of_each})


def write_table(table: pa.Table, file: str) -> None:
    """Write a table as parquet, CSV or JSON lines, by the ending of a path or URI."""
    storage, name = Storage.around(file)
    sink = pa.BufferOutputStream()
    if name.endswith(".parquet"):
        pq.write_table(table, sink)
    elif name.endswith(".csv"):
        pcsv.write_csv(table, sink)
    else:
        sink.write("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in table.to_pylist()).encode())
    storage.write(name, sink.getvalue().to_pybytes())


def _batches(
    model: TrainedClassifier, train: Split, source: str, options: dict[str, Any]
) -> Iterator[tuple[list[Any], Any]]:
    """Yield the samples of a source in batches that ``predict`` takes, with the file, text or row of each."""
    kind = kind_of(model.shape)
    place = place_of(source)
    if kind is IMAGES:
        from raypkg.data.sources.image_files import SUFFIXES, content
        from raypkg.data.store.images import decode_all

        files = files_below(place, SUFFIXES) if place.is_dir() else [place]
        for start in range(0, len(files), BATCH):
            chunk = files[start : start + BATCH]
            names = [str(file).encode(errors="surrogateescape").decode(errors="backslashreplace") for file in chunk]
            pixels = decode_all([content(file) for file in chunk], model.shape, names.__getitem__)
            yield names, kind.tensor(pixels)
        return
    if place.is_dir():
        raise UserError(f"{source!r} is a folder: needed is a file of {kind.raw}")
    if kind is TEXTS:
        from raypkg.data.sources.text import new_texts

        texts = new_texts(place, tuple(options.get("columns", ())))
        x, _ = train.batch(train.spread(1))
        if texts and isinstance(texts[0], str) and (len(options.get("columns", ())) == 2 or (x[:, 1] == 1).any()):
            raise UserError(f"{source!r} has single texts, the model takes pairs: a table with the columns of training")
        for start in range(0, len(texts), BATCH):
            some = texts[start : start + BATCH]
            yield [text if isinstance(text, str) else " | ".join(text) for text in some], some
        return
    from raypkg.data.sources.table import RowTable

    rows = RowTable(place, options.get("label", "label"), wanted=model.columns)
    order = [rows.columns.index(name) for name in model.columns or rows.columns]
    first = 0
    for block in rows.blocks(np.arange(len(rows)), rows.classes):
        x = torch.from_numpy(np.ascontiguousarray(block.sample[:, order]))
        yield [*range(first, first + len(x))], x
        first += len(x)


# Known labels


class Evaluation(NamedTuple):
    """Agreement of predictions with labels.

    >>> found = Evaluation.of(torch.tensor([0, 0, 1]), torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]))
    >>> found.confusion.tolist(), round(found.accuracy, 3), round(found.macro_f1, 3), round(found.calibration, 3)
    ([[1, 1], [0, 1]], 0.667, 0.667, 0.3)
    """

    confusion: np.ndarray  # samples by true and predicted class, int64 [C, C]
    calibration: float  # expected calibration error

    @classmethod
    def of(cls, y: Tensor, probabilities: Tensor) -> Evaluation:
        """Compare labels int64 [n] with probabilities [n, C].

        The calibration error is ``Σ_b |B_b|/n · |accuracy(B_b) − confidence(B_b)|`` over 15 bins of equal width of the
        largest probability (arXiv:1706.04599, Equation 3).
        """
        count = probabilities.shape[1]
        best, labels = probabilities.double().max(1)
        confusion = torch.bincount(y * count + labels, minlength=count**2).view(count, count)
        bins = (best * BINS).ceil().long().clamp(1, BINS) - 1
        gap = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, (labels == y).double() - best)
        return cls(confusion.numpy(), gap.abs().sum().item() / len(y))

    @property
    def accuracy(self) -> float:
        """The share of right labels."""
        return float(self.confusion.trace() / self.confusion.sum())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        from scipy.stats import binomtest

        found = binomtest(int(self.confusion.trace()), int(self.confusion.sum())).proportion_ci(0.95, "wilson")
        return float(found.low), float(found.high)

    @property
    def by_class(self) -> dict[str, np.ndarray]:
        """Samples, precision, recall and F1 of each class, [C]; 0 where a ratio has no denominator."""
        right, there, said = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)

        def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
            return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)

        f1 = ratio(2 * right, there + said)
        return {"samples": there, "precision": ratio(right, said), "recall": ratio(right, there), "F1": f1}

    @property
    def hardest(self) -> list[int]:
        """The classes that have samples, in ascending order of F1."""
        f1 = self.by_class["F1"]
        return sorted(np.flatnonzero(self.confusion.sum(1)).tolist(), key=lambda c: f1[c])

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that are present or predicted."""
        seen = (self.confusion.sum(0) + self.confusion.sum(1)) > 0
        return float(self.by_class["F1"][seen].mean())


def evaluate_run(folder: RunFolder, dataset: Dataset | None, split: str) -> tuple[Evaluation, pa.Table, Sequence[str]]:
    """Evaluate a run's classifier on a split of its own data set, or of another one with classes of the same names.

    Images are seen as in the run's own evaluations (``train.evaluate_views``).
    Returns the evaluation, the predictions with the true labels, and the names of the model's classes.

    Raises:
        UserError: samples of another shape or tokens, or a class that the model does not know.
    """
    model, data, own = trained_classifier(folder)
    chosen = dataset or own.dataset
    if dataset is not None:
        data = open_data(dataset)
    samples: Split = getattr(data, split)
    if samples.kind is not TEXTS and samples.shape != model.shape:
        shapes = f"{list(samples.shape)}, those of run {folder.name!r} {list(model.shape)}"
        raise UserError(f"the samples of {chosen.name!r} have the shape {shapes}")
    if samples.columns and model.columns and samples.columns != model.columns:
        columns = f"{', '.join(samples.columns)}, those of run {folder.name!r} {', '.join(model.columns)}"
        raise UserError(f"the samples of {chosen.name!r} have the columns {columns}")
    check_same_tokens(chosen, own.dataset, data, folder.name)
    if foreign := next((name for name in samples.classes if name not in model.classes), None):
        raise unknown(f"class of {chosen.name!r} in the model of run {folder.name!r}:", foreign, model.classes)
    number = torch.tensor([model.classes.index(name) for name in samples.classes])
    views = folder.config.get("train", {}).get("evaluate_views", "plain")
    parts = torch.arange(len(samples)).split(BATCH)
    probabilities = torch.cat([model.predict(samples.batch(part)[0], views=views).probabilities for part in parts])
    y = number[samples.y if samples.truth is None else samples.truth]  # not the wrong labels of dataset.noise
    table = table_of(range(len(samples)), probabilities, model.classes)
    truth = pa.array([model.classes[label] for label in y.tolist()])
    return Evaluation.of(y, probabilities), table.add_column(1, "truth", truth), model.classes


class Paired(NamedTuple):
    """Two models on the same samples.

    >>> round(Paired(only_first=14, only_second=6, n=360).p, 3)  # 2 · P(at most 6 of 20 fair coins)
    0.115
    """

    only_first: int  # samples that only the first model has right, b
    only_second: int  # c
    n: int

    @property
    def difference(self) -> tuple[float, float, float]:
        """The first accuracy minus the second, d = (b − c)/n, and its 95 % interval by √(b + c − (b − c)²/n)/n."""
        b, c, n = self
        half = CONFIDENT * (b + c - (b - c) ** 2 / n) ** 0.5 / n
        return (b - c) / n, (b - c) / n - half, (b - c) / n + half

    @property
    def p(self) -> float:
        """The exact p of McNemar's test: two-sided binomial of b among b + c at ½."""
        from scipy.stats import binomtest

        changed = self.only_first + self.only_second
        return float(binomtest(self.only_first, changed).pvalue) if changed else 1.0


def pair_runs(run: RunFolder, other: RunFolder) -> Paired | None:
    """Compare two runs' classifiers on their test samples, or return None if these are not the same."""
    ours, theirs = (settings_of_trained(each).dataset for each in (run, other))
    if (ours.name, ours.options) != (theirs.name, theirs.options):
        return None
    tables = [evaluate_run(each, None, "test")[1] for each in (run, other)]
    right, others_right = (np.equal(table["truth"].to_pylist(), table["label"].to_pylist()) for table in tables)
    return Paired(int((right & ~others_right).sum()), int((~right & others_right).sum()), len(right))

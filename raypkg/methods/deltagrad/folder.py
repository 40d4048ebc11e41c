"""The folder of an estimator: the record of its training, its samples and the journal of its changes.

estimator.json       settings, classes and scale of the samples, and the batches that another loop has chosen
added/00000.arrow    samples of the training
log.jsonl, …         the journal, whose first entry makes the folder valid, with the files that it describes
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from raypkg.core.config import validate
from raypkg.core.errors import UserError
from raypkg.data import Data
from raypkg.data.split import Split
from raypkg.experiments.samples import Samples
from raypkg.runs.checkpoints import save_tensors
from raypkg.runs.folder import MODEL, RunFolder
from raypkg.runs.storage import Storage

from .history import HistoryWriter, Layout, check_room, history_folder
from .journal import LOG, ROWS_FILE, Journal
from .run import Recorded
from .settings import DeltaGradSettings

ESTIMATOR = "estimator.json"


class Place:
    """The folder of a record; a temporary one is deleted with this object."""

    def __init__(self, folder: str | os.PathLike[str] | None):
        self.folder = tempfile.mkdtemp(prefix="deltagrad-") if folder is None else str(folder)
        if folder is None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def new_history(place: Place, layout: Layout, steps: int) -> HistoryWriter:
    """Return the writer of a new folder's history; a used folder, and a history that does not fit, are refused."""
    storage = Storage(place.folder)
    if set(storage.list()) - {"versions", "added", MODEL, ESTIMATOR}:  # left by a training that was killed
        raise UserError(f"{place.folder!r} holds a record or other files: load it, or choose a new folder")
    check_room(history_folder(storage, 0), layout, steps)
    return HistoryWriter(history_folder(storage, 0), layout)


def complete(
    place: Place,
    settings: DeltaGradSettings,
    split: Split,
    classes: np.ndarray,
    state: dict[str, Tensor],
    sealed: str,
    batches: Sequence[Tensor] = (),
) -> None:
    """Complete a folder that has the history; the first entry of its journal makes it valid."""
    storage = Storage(place.folder)
    journal = Journal(RunFolder(storage))
    save_tensors(storage, MODEL, state)
    journal.write_rows(0, split)
    content = {
        "settings": settings.model_dump(mode="json"),
        "classes": classes.tolist(),
        "dtype": classes.dtype.str,
        "mean": split.mean,
        "std": split.std,
        "batches": [batch.tolist() for batch in batches],
    }
    storage.write_json(ESTIMATOR, content)
    files = {"settings": ESTIMATOR, "rows": ROWS_FILE.format(0), "model": MODEL}
    digests = {name: storage.digest(file) for name, file in files.items()}
    journal.append({"kind": "train", **digests, "history": sealed})


def open_record(place: Place) -> tuple[Recorded, np.ndarray]:
    """Open a complete folder; return the record and the classes, [C]."""
    folder = RunFolder(Storage(place.folder))
    journal = Journal(folder)
    if not journal.entries:
        raise UserError(f"{place.folder}/{LOG} is missing: the record was never completed, or its log is lost")
    first = journal.entries[0]
    if folder.storage.digest(ESTIMATOR) != first["settings"]:
        raise UserError(f"{place.folder}/{ESTIMATOR} is missing or corrupt: its digest is not that of the log")
    stored = folder.storage.read_json(ESTIMATOR)
    assert stored is not None
    split = replace(journal.added_rows(first), mean=tuple(stored["mean"]), std=tuple(stored["std"]))
    samples = Samples(Data(split, split), torch.arange(len(split)), held_out=torch.arange(0))
    batches = [torch.tensor(batch) for batch in stored["batches"]]
    run = Recorded(folder, journal, validate(DeltaGradSettings, stored["settings"]), samples, batches)
    return run, np.array(stored["classes"], np.dtype(stored["dtype"]))


@contextmanager
def exclusively(run: Recorded) -> Iterator[None]:
    """Keep other processes away; refuse a record that one of them has changed."""
    root = run.storage.root
    with run.storage.locked(f"the record in {root!r}"):
        if run.journal.stored() != len(run.journal.entries):
            raise UserError(f"the record in {root!r} was changed by another process: load it again")
        yield

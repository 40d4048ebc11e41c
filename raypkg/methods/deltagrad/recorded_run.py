"""A recorded run and what became of it: which samples its model has been trained on, as the log says."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.data.kinds import IMAGES
from raypkg.data.split import Split
from raypkg.data.store.arrow import Block, Header, Store, write
from raypkg.experiments.samples import Samples, forget_samples, new_model, open_any_samples
from raypkg.experiments.trust import stored_settings
from raypkg.runs.checkpoints import load_tensors, save_tensors
from raypkg.runs.folder import MODEL, RunFolder
from raypkg.runs.sealed import CONFIG
from raypkg.runs.storage import PART, Storage

from .fingerprints import (
    check_rows,
    read_fingerprints,
    settings_digest,
    standardised_as_trained,
    write_fingerprints,
)
from .history import History, Layout, history_folder
from .joined import joined
from .ledger import FILE as LOG
from .ledger import Entry, Ledger, digest_of_file, stored_digest
from .leftovers import drop_leftovers
from .membership import Membership
from .objective import Objective, assign, to_vector
from .settings import DeltaGradSettings

ROWS_AT_ONCE = 4096  # of added samples that are copied


class Change(NamedTuple):
    """What is to be different about the training samples.

    Attributes:
        gone: ids that are in use and shall not be, int64.
        came: ids that are not in use and shall be, int64.
        new: samples that were never there; they get the next ids.
        requests: id and digest of the requests that ask for it; those of the command line have no id.
    """

    gone: Tensor
    came: Tensor
    new: Split | None
    requests: tuple[dict[str, str], ...]


def begin_log(storage: Storage, settings: DeltaGradSettings, samples: Samples, history: str) -> None:
    """Write the first entry of a run's log, unless it is there.

    Args:
        storage: the run's folder.
        settings: of the run.
        samples: that it was trained on.
        history: its digest.
    """
    ledger = Ledger(storage)
    if ledger.entries:
        return
    ledger.append(
        {
            "kind": "train",
            "samples": len(samples.train_indices),
            "settings": settings_digest(settings),
            "rows": write_fingerprints(storage, samples.data.train),
            "model": stored_digest(storage, MODEL),
            "history": history,
        }
    )


@contextmanager
def open_recorded(folder: RunFolder) -> Iterator["RecordedRun"]:
    """Open a recorded run for one process alone.

    Raises:
        UserError: it was not recorded to its end, another process has it open, or what ``RecordedRun`` raises.
    """
    _check_recorded(folder)
    with folder.storage.alone(f"run {folder.name!r}"):
        forget_samples()  # the data set may have changed since this process opened it
        yield RecordedRun(folder)


class RecordedRun:
    """A recorded run with everything that was deleted from and added to it since.

    Inside, an id is a position in the training split; samples that were added are numbered on from its end, in the
    order of their requests. Where the split has ids of its own, users give those and are told those. What the log's
    last entry says is what holds: anything beyond it on the disk never happened.

    Args:
        folder: of a run of `effray deltagrad train`.

    Attributes:
        active: whether a sample is in use, bool [ids].

    Raises:
        UserError: the run has no history, its log is damaged, or model or data set are not those of the log.
    """

    def __init__(self, folder: RunFolder):
        self._folder = folder
        self.storage = folder.storage
        self.ledger = Ledger(folder.storage)
        first, *changes = self.ledger.entries
        if not changes:
            _check_finished(folder)
        self.settings = _trained_settings(folder, first["settings"])
        fingerprints = read_fingerprints(self.storage, first["rows"])
        samples = open_any_samples(self.settings)  # deleted rows may have been blanked; `check_rows` tells of others
        self.samples = standardised_as_trained(fingerprints, samples)
        self._check_model()
        self._settle()
        train = self.samples.data.train
        self._groups = [train]  # the training split, and each group of samples that was added
        self.active = torch.zeros(len(train), dtype=torch.bool)
        self.active[self.samples.train_indices] = True
        for entry in changes:
            self._apply(entry)
        check_rows(fingerprints, train, self.active)

    # Who is in the training

    @property
    def split(self) -> Split:
        """All samples that ever were in the training split, by id."""
        return joined(*self._groups)

    @property
    def test(self) -> Split:
        """The test samples."""
        return self.samples.data.test

    @property
    def membership(self) -> Membership:
        """Which sample has a place in which batch."""
        ends = list(accumulate(len(group) for group in self._groups))
        added = tuple(torch.arange(start, end) for start, end in pairwise(ends))
        return Membership(self.samples.train_indices, added, self.settings.train.batch_size, self.settings.seed)

    # The log

    @property
    def last(self) -> Entry:
        """The last entry of the log."""
        return self.ledger.entries[-1]

    @property
    def answered(self) -> dict[str, str]:
        """The requests of queues that were answered, by their ids, with the digests of what they asked for."""
        requests = (request for entry in self.ledger.entries for request in entry.get("requests", ()))
        return {request["id"]: request["digest"] for request in requests if request["id"]}

    def enter(self, entry: Mapping[str, Any]) -> Entry:
        """Write an entry whose files are all there, make it hold, and return it.

        Raises:
            UserError: the disk is full; the error tells whether the entry holds all the same.
        """
        before = len(self.ledger.entries)
        try:
            written = self.ledger.append(entry)
            self._apply(written)
            self._settle()
        except UserError as error:
            if self.stored_entries == before:
                raise
            rest = "the request holds all the same, and the next command on the run does the rest"
            raise UserError(f"{error}; {rest}") from None
        return written

    @property
    def stored_entries(self) -> int:
        """How many entries the log has on the disk: an interruption may have come before ``enter`` returned."""
        return len(Ledger(self.storage).entries)

    def clean_up(self) -> None:
        """Delete what the log does not have: of requests that failed or died, and histories that were replaced.

        Raises:
            UserError: it cannot be deleted.
        """
        last = self.stored_entries - 1
        drop_leftovers(_local(self.storage), last, PART)

    # The model and its history

    @property
    def objective(self) -> Objective:
        """The loss of the run's model."""
        return Objective.of(self.settings.model, self.samples.data.train)

    @property
    def layout(self) -> Layout:
        """How the history lies in its file."""
        return Layout.of(self._new_model(), self.settings.history.dtype)

    def history(self) -> History:
        """Open the record of the training as the last entry left it."""
        folder = history_folder(self.storage, self.last["number"])
        return History(folder, self.layout, self.last["history"])

    def weights(self) -> Tensor:
        """Return the current weights, float64 [p], in the order of ``model.parameters()``."""
        saved = load_tensors(self.storage, MODEL)
        names = [name for name, _ in self._new_model().named_parameters()]
        return to_vector(saved[name].double() for name in names)

    # What an entry refers to is written before the entry

    def write_model(self, number: int, w: Tensor) -> str:
        """Write the weights that an entry is going to refer to as a model file; return its digest."""
        model = self._new_model().double()
        assign(model, w)
        save_tensors(self.storage, _model_file(number), model.state_dict())
        return stored_digest(self.storage, _model_file(number))

    def write_change(self, number: int, change: Change) -> dict[str, str]:
        """Write the change that an entry is going to refer to; return the digests that it names.

        Raises:
            UserError: the disk is full.
        """
        name = _change_file(number)
        ids = torch.cat([change.gone, change.came]).numpy()
        in_use = np.arange(len(ids)) >= len(change.gone)
        self.storage.write_table(name, pa.table({"id": ids, "in_use": in_use}))
        digests = {"changes": stored_digest(self.storage, name)}
        if change.new:
            _write_rows(self._rows_file(number), change.new)
            digests["rows"] = digest_of_file(self._rows_file(number))
        return digests

    def _apply(self, entry: Entry) -> None:
        """Let what an entry says hold: the samples that it added, and who is in use after it."""
        name = _change_file(entry["number"])
        table = None
        if stored_digest(self.storage, name) == entry["changes"]:
            table = self.storage.read_table(name)
        if table is None:
            raise UserError(f"{self.storage.root}/{name} is missing or corrupt: it is not what the log names")
        if entry["new"]:
            self._groups.append(self._added_rows(entry))
            in_use = torch.ones(entry["new"], dtype=torch.bool)
            self.active = torch.cat([self.active, in_use])
        ids = torch.tensor(table["id"].to_numpy())
        self.active[ids] = torch.tensor(table["in_use"].to_numpy())

    def _added_rows(self, entry: Entry) -> Split:
        file = self._rows_file(entry["number"])
        if digest_of_file(file) != entry["rows"]:
            raise UserError(f"{str(file)!r} is missing or corrupt: it is not what the log names")
        return Store(file).as_split()

    def _check_model(self) -> None:
        known = [entry["model"] for entry in self.ledger.entries[-2:]]  # the last may not have been settled
        if stored_digest(self.storage, MODEL) not in known:
            raise UserError(f"{self.storage.root}/{MODEL} is not the model of the log's last entry: one was changed")

    def _settle(self) -> None:
        """Do what the writer of the last entry may have died before: put its model in place, drop older histories."""
        if stored_digest(self.storage, MODEL) != self.last["model"]:
            name = _model_file(self.last["number"])
            if stored_digest(self.storage, name) != self.last["model"]:
                raise UserError(f"{self.storage.root}/{name} is missing or corrupt: it is not what the log names")
            self.storage.write(MODEL, self.storage.read(name) or b"")
        self._folder.note_change(MODEL)
        self.clean_up()

    def _new_model(self) -> nn.Module:
        return new_model(self.settings, self.samples.data)

    def _rows_file(self, number: int) -> Path:
        return _local(self.storage) / "added" / f"{number:05d}.arrow"


def _check_recorded(folder: RunFolder) -> None:
    """Refuse a run without a history, or without its log."""
    log = folder.storage.read(LOG)
    if log is None and not folder.storage.list("versions"):
        raise UserError(f"run {folder.name!r} has no recorded history: `effray deltagrad train` makes one")
    if log is None:
        _check_finished(folder)
    if not log:
        raise UserError(f"{folder.storage.root}/{LOG} is missing or empty: what was done to the run is lost")


def _check_finished(folder: RunFolder) -> None:
    if folder.summary is None:
        missing = f"{folder.storage.root}/summary.json is missing: the run is not finished"
        raise UserError(f"{missing}, `effray deltagrad train --resume {folder.name}` goes on with it")


def _trained_settings(folder: RunFolder, expected: str) -> DeltaGradSettings:
    """Return a run's settings, if they have the digest that the log names."""
    where = f"{folder.storage.root}/{CONFIG}"
    values = stored_settings(folder)
    try:
        settings = load_settings(DeltaGradSettings, values)
    except UserError as error:
        raise UserError(f"{where} is damaged: {error}") from None
    if settings_digest(settings) != expected:
        raise UserError(f"{where} is not that of the recorded training: it or {LOG} was changed")
    return settings


def _local(storage: Storage) -> Path:
    return history_folder(storage, 0).parents[1]


def _model_file(number: int) -> str:
    return f"versions/{number:05d}/{MODEL}"


def _change_file(number: int) -> str:
    return f"requests/{number:05d}.parquet"


def _write_rows(path: Path, split: Split) -> None:
    unfinished = path.with_suffix(".part")
    header = Header("pixels" if split.kind is IMAGES else "rows", split.shape, split.classes)
    try:
        path.parent.mkdir(exist_ok=True)
        write(unfinished, header, _blocks(split))
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def _blocks(split: Split) -> Iterator[Block]:
    y = split.y.numpy()
    for start in range(0, len(split), ROWS_AT_ONCE):
        end = min(start + ROWS_AT_ONCE, len(split))
        indices = np.arange(start, end)
        x = split.take(indices)
        yield Block(x, y[indices], sample=x)

"""The books of a recorded run: which samples its model has been trained on, as the log says."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment
from raypkg.data.split import Split, joined
from raypkg.data.store.arrow import Block, Header, Store, write
from raypkg.phases.samples import new_model, open_samples
from raypkg.phases.training import MODEL
from raypkg.runs.folder import RunFolder

from .history import History
from .ledger import FILE as LOG
from .ledger import Ledger, digest, digest_of
from .membership import Membership
from .objective import Objective
from .recorded_data import as_trained, check_rows, settings_digest
from .recording import layout, trained_weights, version

ROWS = 4096  # of added samples copied at once


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


class Books:
    """A recorded run with everything that was deleted from and added to it since.

    An id is a position in the training split; samples that were added are numbered on from its end, in the order of
    their requests. What the log's last entry says is what holds: anything beyond it on the disk never happened.

    Args:
        folder: of a run of `effray deltagrad train`.
        schema: class of its settings.
        replay: settings that hold for the moment, by their dotted names.

    Attributes:
        active: whether a sample is in use, bool [ids].

    Raises:
        UserError: the run has no history, its log is damaged, or model or data set are not those of the log.
    """

    def __init__(self, folder: RunFolder, schema: type[Experiment], replay: Mapping[str, Any]):
        self.storage, self.ledger = folder.storage, Ledger(folder.storage)
        self.settings: Any = load_settings(schema, folder.config, replay)
        self.found = as_trained(self.storage, open_samples(self.settings))
        self._check()
        self._groups = [self.found.data.train]  # the training split and what was added
        self.active = torch.zeros(len(self.split), dtype=torch.bool).index_fill(0, self.found.kept, True)
        for entry in self.ledger.entries[1:]:
            self._apply(entry)
        check_rows(self.storage, self.found.data.train, self.active, self.ledger.entries[0]["rows"])

    @property
    def split(self) -> Split:
        """All samples that ever were in the training split, by id."""
        return joined(*self._groups)

    @property
    def last(self) -> dict[str, Any]:
        """The last entry of the log."""
        return self.ledger.entries[-1]

    @property
    def answered(self) -> dict[str, str]:
        """The requests of queues that were answered, by their ids, with the digests of what they asked for."""
        return {
            asked["id"]: asked["digest"]
            for entry in self.ledger.entries
            for asked in entry.get("requests", ())
            if asked["id"]
        }

    @property
    def membership(self) -> Membership:
        """Who has a place in which batch."""
        starts = [0, *accumulate(map(len, self._groups))]
        added = tuple(torch.arange(start, end) for start, end in pairwise(starts[1:]))
        return Membership(self.found.kept, added, self.settings.train.batch_size, self.settings.seed)

    @property
    def objective(self) -> Objective:
        """The loss of the run's model."""
        return Objective.of(self.settings.model, self.found.data.train)

    def history(self) -> History:
        """Open the record of the training as the last entry left it."""
        folder = version(self.storage, self.last["number"])
        return History(folder, layout(self.settings, self.found.data), self.last["history"])

    def weights(self) -> Tensor:
        """Return the current weights, float64 [p]."""
        return trained_weights(self.storage, new_model(self.settings, self.found.data))

    def write_change(self, number: int, change: Change) -> dict[str, str]:
        """Write what an entry is going to refer to; return the digests that it names.

        Raises:
            UserError: the disk is full.
        """
        ids = torch.cat([change.gone, change.came]).numpy()
        in_use = np.arange(len(ids)) >= len(change.gone)
        self.storage.write_table(_changes(number), pa.table({"id": ids, "in_use": in_use}))
        if change.new:
            _write_rows(self._rows(number), change.new)
        rows = {"rows": digest_of(self._rows(number))} if change.new else {}
        return {"changes": digest(self.storage.read(_changes(number)) or b""), **rows}

    def enter(self, entry: Mapping[str, Any]) -> None:
        """Write an entry whose files are all there, and let the run be what it says."""
        self._apply(self.ledger.append(entry))
        self._settle()

    def _apply(self, entry: Mapping[str, Any]) -> None:
        name = _changes(entry["number"])
        content, table = self.storage.read(name), self.storage.read_table(name)
        if content is None or table is None or digest(content) != entry["changes"]:
            raise UserError(f"{self.storage.root}/{name} is missing or corrupt: it is not what the log names")
        if entry["new"]:
            rows = self._rows(entry["number"])
            if digest_of(rows) != entry["rows"]:
                raise UserError(f"{str(rows)!r} is missing or corrupt: it is not what the log names")
            group = Store(rows).as_split()
            self._groups.append(group)
            self.active = torch.cat([self.active, torch.ones(len(group), dtype=torch.bool)])
        ids, in_use = (torch.tensor(table[column].to_numpy()) for column in ("id", "in_use"))
        self.active[ids] = in_use

    def _check(self) -> None:
        known = [entry["model"] for entry in self.ledger.entries[-2:]]
        if digest(self.storage.read(MODEL) or b"") not in known:
            raise UserError(f"{self.storage.root}/{MODEL} is not the model of the log's last entry: one was changed")
        if settings_digest(self.settings) != self.ledger.entries[0]["settings"]:
            raise UserError(f"{self.storage.root}/config.toml is not that of the recorded training")
        self._settle()

    def _settle(self) -> None:
        """Do what the writer of the last entry may have died before: put its model in place, drop older histories."""
        current = version(self.storage, self.last["number"])
        if digest(self.storage.read(MODEL) or b"") != self.last["model"]:
            model = self.storage.read(f"versions/{current.name}/{MODEL}") or b""
            if digest(model) != self.last["model"]:
                raise UserError(
                    f"{str(current / MODEL)!r} is missing or corrupt: it is not the model that the log names"
                )
            self.storage.write(MODEL, model)
        for name in self.storage.list("versions"):
            if name != current.name:
                self.storage.delete_folder(f"versions/{name}")

    def _rows(self, number: int) -> Path:
        return version(self.storage, number).parents[1] / "added" / f"{number:05d}.arrow"


@contextmanager
def open_books(folder: RunFolder, schema: type[Experiment], replay: Mapping[str, Any]) -> Iterator[Books]:
    """Open the books of a run for one process alone.

    Raises:
        UserError: another process has them open, or what ``Books`` raises.
    """
    if folder.storage.read(LOG) is None:
        raise UserError(f"run {folder.name!r} has no recorded history: `effray deltagrad train` makes one")
    with folder.storage.alone(f"run {folder.name!r}"):
        yield Books(folder, schema, replay)


def _changes(number: int) -> str:
    return f"requests/{number:05d}.parquet"


def _write_rows(path: Path, split: Split) -> None:
    unfinished = path.with_suffix(".part")
    try:
        path.parent.mkdir(exist_ok=True)
        write(unfinished, _header(split), _blocks(split))
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def _header(split: Split) -> Header:
    return Header("pixels" if len(split.shape) == 3 else "rows", split.shape, split.classes)


def _blocks(split: Split) -> Iterator[Block]:
    for indices in np.split(np.arange(len(split)), range(ROWS, len(split), ROWS)):
        x = split.take(indices)
        yield Block(x, split.y[torch.from_numpy(indices)].numpy(), x)

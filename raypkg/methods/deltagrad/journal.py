"""The journal of a recorded run: what was done to it, and how a request becomes durable.

    log.jsonl                one line of JSON per entry; each holds the digest of the one before
    versions/00002/          history and model of entry 2, the last one; older versions are deleted
    requests/00002.parquet   ids that entry 2 changed, and whether they are in use since
    added/00002.arrow        samples that entry 2 added
    model.safetensors        the model of the last entry

`Journal.commit` makes a request durable, by one atomic write of the log.
"""

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.data.kinds import IMAGES
from raypkg.data.split import Split
from raypkg.data.store.arrow import Block, Header, Store, write
from raypkg.runs.checkpoints import save_tensors
from raypkg.runs.folder import LOG, MODEL
from raypkg.runs.storage import Storage

from .history import digest, history_folder

MODEL_FILE = "versions/{:05d}/" + MODEL
CHANGE_FILE = "requests/{:05d}.parquet"
ROWS_FILE = "added/{:05d}.arrow"
ROWS_AT_ONCE = 4096  # added samples copied at once

Entry = dict[str, Any]


class Change(NamedTuple):
    """The difference that requests make to the training samples, new ones included."""

    before: Tensor  # samples in use before, bool [ids]; the new ones count as used
    now: Tensor  # samples in use afterwards, bool [ids]
    new: Split | None  # samples that get the last ids
    requests: tuple[dict[str, Any], ...]  # of each: id, empty on the command line, digest, samples changed by kind


class Journal:
    """The journal of a run in a local folder.

    The entries form a chain of digests: opening the journal finds and names a changed, lost or reordered one.
    """

    def __init__(self, storage: Storage):
        self._storage = storage
        self._root = history_folder(storage, 0).parents[1]
        self.entries: list[Entry] = []  # the last one describes the run as it is
        for number, line in enumerate((self._storage.read(LOG) or b"").splitlines(keepends=True)):
            where = f"entry {number} of {self._storage.root}/{LOG}"
            try:
                entry = json.loads(line)
                body = {name: value for name, value in entry.items() if name != "digest"}
                sound = _sealed(body)["digest"] == entry["digest"] and line == _line(entry)
                sound &= entry["previous"] == self._head and entry["number"] == number
            except (ValueError, KeyError, AttributeError, RecursionError):
                sound = False
            if not sound:
                raise UserError(f"{where} is corrupt, or does not follow the one before: entries were changed or lost")
            self.entries.append(entry)

    def stored(self) -> int:
        """Return the number of entries on the disk, one more than in memory if `commit` was interrupted late."""
        return len((self._storage.read(LOG) or b"").splitlines())

    def append(self, content: Mapping[str, Any]) -> Entry:
        """Add an entry by an atomic, synced write; what it refers to must be on the disk."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        entry = _sealed({"number": len(self.entries), "time": now, **content, "previous": self._head})
        self._storage.write(LOG, b"".join(map(_line, [*self.entries, entry])))
        self.entries.append(entry)
        return entry

    def commit(self, change: Change, model: dict[str, Tensor], facts: Mapping[str, Any], started: float) -> Entry:
        """Make an answered request durable and return its entry; its history has been written.

        The request is in force as soon as the log has its entry. If the process ends before, nothing has changed; if it
        ends afterwards, `settle` does the rest when the run is opened again. The entry also holds ``facts``, such
        as the history's digest; ``started`` is ``time.perf_counter()`` when work on the request began.
        """
        # First all files that the entry refers to, under its number: as long as the log lacks it, they are leftovers.
        number = len(self.entries)
        save_tensors(self._storage, MODEL_FILE.format(number), model)
        ids = (change.before != change.now).nonzero()[:, 0]
        in_use = change.now[ids]
        table = pa.table({"id": ids.numpy(), "in_use": in_use.numpy()})
        self._storage.write_table(CHANGE_FILE.format(number), table)
        files = {"changes": CHANGE_FILE, "model": MODEL_FILE}
        if change.new:
            self.write_rows(number, change.new)
            files["rows"] = ROWS_FILE
        content = {
            "kind": "change",
            "requests": list(change.requests),
            "deleted": int((~in_use).sum()),
            "restored": int(in_use.sum()),
            "new": len(change.new) if change.new else 0,
            **{name: self._storage.digest(file.format(number)) for name, file in files.items()},
            **facts,
            "seconds": time.perf_counter() - started,
        }
        try:
            entry = self.append(content)  # the request is in force from here on
            self.settle()
        except UserError as error:
            # The entry may be on the disk although writing it failed, as when only syncing its folder did.
            if self.stored() == number:
                raise
            rest = "the request is in force all the same, and the next command on the run does the rest"
            raise UserError(f"{error}; {rest}") from None
        return entry

    def settle(self) -> None:
        """Finish the last commit: put its model in place and delete what is no longer needed."""
        last = self.entries[-1]
        here = self._storage.digest(MODEL)
        if here not in [entry["model"] for entry in self.entries[-2:]]:
            raise UserError(f"{self._storage.root}/{MODEL} is not the model of the log's last entry: one was changed")
        if here != last["model"]:
            name = MODEL_FILE.format(last["number"])
            self._check(name, last["model"])
            self._storage.write(MODEL, self._storage.read(name) or b"")
        self.clean_up()

    def clean_up(self) -> None:
        """Delete the files of replaced histories, and of requests that failed or were killed."""
        last = self.stored() - 1
        for name in self._storage.list("versions"):
            if name.isdecimal() and int(name) != last:
                self._storage.delete_folder(f"versions/{name}")
        self._storage.delete_unfinished()
        for folder in ("requests", "added"):
            for name in self._storage.list(folder):
                number = name.partition(".")[0]
                if number.isdecimal() and int(number) > last:
                    self._storage.delete(f"{folder}/{name}")
            with suppress(OSError):  # not empty, or missing
                (self._root / folder).rmdir()

    def table(self, name: str, digest: str) -> pa.Table:
        """Read a table that an entry describes."""
        self._check(name, digest)
        table = self._storage.read_table(name)
        assert table is not None
        return table

    def added_rows(self, entry: Entry) -> Split:
        """Open the samples that an entry added."""
        name = ROWS_FILE.format(entry["number"])
        self._check(name, entry["rows"])
        return Store(self._root / name).as_split()

    @property
    def _head(self) -> str:
        return self.entries[-1]["digest"] if self.entries else ""

    def _check(self, name: str, digest: str) -> None:
        if self._storage.digest(name) != digest:
            raise UserError(f"'{self._storage.root}/{name}' is missing or corrupt: its digest is not that of the log")

    def write_rows(self, number: int, split: Split) -> None:
        """Write the samples that an entry adds."""
        positions = np.split(np.arange(len(split)), range(ROWS_AT_ONCE, len(split), ROWS_AT_ONCE))
        samples = ((split.take(rows), split.y.numpy()[rows]) for rows in positions)
        blocks = (Block(x, y, sample=x) for x, y in samples)
        header = Header("pixels" if split.kind is IMAGES else "rows", split.shape, split.classes)
        with self._storage.replacement(ROWS_FILE.format(number)) as path:
            write(Path(path), header, blocks)


def group_sizes(requests: Iterable[Mapping[str, Any]], new: int) -> list[int]:
    """Return the numbers of ``new`` samples by the request that added them; one group if no request says so."""
    return [request["new"] for request in requests if "new" in request] or [new] * (new > 0)


def _sealed(body: Mapping[str, Any]) -> Entry:
    return {**body, "digest": digest(json.dumps(body, sort_keys=True).encode()).hex()}


def _line(entry: Entry) -> bytes:
    return json.dumps(entry).encode() + b"\n"

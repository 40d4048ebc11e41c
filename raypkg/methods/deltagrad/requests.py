"""From what a user asks for to a change of a recorded run: ids, conditions, new data, and queues of those."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from raypkg.core.errors import UserError, unknown
from raypkg.core.registry import argument
from raypkg.data.sources import dataset
from raypkg.data.split import Split

from .conditions import matching
from .joined import aligned, joined
from .ledger import digest
from .recorded_run import Change, RecordedRun

KINDS = ("delete", "delete_where", "restore", "add")


class Request(NamedTuple):
    """What one line of a queue asks for.

    Attributes:
        kind: delete or restore (ids), delete_where (a condition) or add (a data set's name).
        value: what of.
        id: by which a queue's request is known, which is answered once; empty on the command line.
    """

    kind: str
    value: Any
    id: str = ""

    @property
    def logged(self) -> dict[str, str]:
        """What the log says of the request: its id, and a digest of what it asks for."""
        value = self.value.tolist() if isinstance(self.value, Tensor) else self.value
        content = json.dumps([self.kind, value])
        return {"id": self.id, "digest": digest(content.encode())}


def read_ids(text: str) -> Tensor:
    """Return ids given as ``3,14,15`` or in a file: one a line, or the column ``id`` or ``index`` of a parquet file.

    Raises:
        UserError: unreadable, no such column, no integers, or none at all.
    """
    try:
        ids = [_integer(value) for value in _id_values(text)]
        array = np.array(ids, np.int64)
    except (OSError, pa.ArrowException, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise UserError(f"ids in {text!r} cannot be read: {error}") from None
    if not len(array):
        raise UserError(f"{text!r} holds no ids")
    return torch.from_numpy(array)


def read_queue(file: Path) -> list[Request]:
    """Return the requests of a queue: lines of JSON such as {"delete": [3, 7], "id": "ticket 12"}.

    Raises:
        UserError: unreadable, a line that is no request, or the same id twice.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the queue {str(file)!r} cannot be read: {error}") from None
    requests = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"line {number} of {str(file)!r}"
            requests.append(_request(line, where))
    counts = Counter(request.id for request in requests)
    if repeated := next((key for key in counts if counts[key] > 1), None):
        times = counts[repeated]
        raise UserError(f"the queue {str(file)!r} has the id {repeated!r} {times} times")
    return requests


def unanswered(run: RecordedRun, requests: Iterable[Request]) -> list[Request]:
    """Return the requests of a queue that the log does not have yet.

    Raises:
        UserError: one has the id of another that was answered.
    """
    waiting = []
    answered = run.answered
    for request in requests:
        if request.id not in answered:
            waiting.append(request)
        elif answered[request.id] != request.logged["digest"]:
            raise UserError(f"the id {request.id!r} belongs to another request, which was answered: give a new one")
    return waiting


def grouped(requests: list[Request], size: int) -> Iterator[list[Request]]:
    """Yield requests in order, so many at a time."""
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def change_of(run: RecordedRun, requests: Iterable[Request]) -> Change:
    """Return the change that several requests amount to, each checked against what those before it leave.

    Raises:
        UserError: ids that are unknown, repeated or not in use (or in use, to restore), a deletion of everything or of
            a whole class, or new samples that do not fit.
    """
    draft = _Draft(run)
    for request in requests:
        try:
            draft.take(request)
        except UserError as error:
            if not request.id:  # of the command line
                raise
            raise UserError(f"request {request.id!r}: {error}") from None
    return draft.change()


class _Draft:
    """A change in the making: what the requests so far leave of a run."""

    def __init__(self, run: RecordedRun):
        self._run = run
        self._split = run.split
        self._added: list[Split] = []
        self._requests: list[Request] = []
        self._before = run.active  # new samples count as in use before, so that they are no change by themselves
        self._active = run.active.clone()

    def take(self, request: Request) -> None:
        if request.kind == "add":
            self._add(_new_samples(self._run, request.value))
        elif request.kind == "restore":
            self._active[self._restored(request.value)] = True
        else:
            self._active[self._deleted(request)] = False
            self._check_left(request.kind)
        self._requests.append(request)

    def change(self) -> Change:
        return Change(
            gone=_positions(self._before & ~self._active),
            came=_positions(self._active & ~self._before),
            new=joined(*self._added) if self._added else None,
            requests=tuple(request.logged for request in self._requests),
        )

    def _add(self, samples: Split) -> None:
        self._added.append(samples)
        self._split = joined(self._run.split, *self._added)
        in_use = torch.ones(len(samples), dtype=torch.bool)
        self._before = torch.cat([self._before, in_use])
        self._active = torch.cat([self._active, in_use])

    def _restored(self, value: Any) -> Tensor:
        ids = self._known_ids("restore", value)
        _refuse("restore", ids[self._active[ids]], "is in use already")
        return ids

    def _deleted(self, request: Request) -> Tensor:
        if request.kind == "delete_where":
            return self._matching(request.value)
        ids = self._known_ids("delete", request.value)
        _refuse("delete", ids[~self._active[ids]], "is deleted already")
        return ids

    def _matching(self, condition: str) -> Tensor:
        matches = torch.from_numpy(matching(self._split, condition))
        ids = matches[self._active[matches]]
        if not len(ids):
            raise UserError(f"no sample in use meets {condition!r}")
        return ids

    def _known_ids(self, kind: str, value: Any) -> Tensor:
        """Return ids, of which none is unknown, repeated or held out."""
        ids = torch.as_tensor(value, dtype=torch.int64)
        last = len(self._active) - 1
        outside = (ids < 0) | (ids > last)
        _refuse(kind, ids[outside], f"is unknown, allowed are 0 … {last}")
        values, counts = ids.unique(return_counts=True)
        most = int(counts.max())
        if most > 1:
            _refuse(kind, values[counts == most], f"is given {most} times")
        valid = self._run.samples.valid
        held_out = torch.isin(valid, ids)
        _refuse(kind, valid[held_out], "is held out for validation and was never trained on")
        return ids

    def _check_left(self, kind: str) -> None:
        """Refuse a deletion that leaves nothing, or nothing of a class."""
        if not self._active.any():
            raise UserError(f"{kind}: this would delete every sample")
        left = self._per_class(self._active)
        had = self._per_class(self._before)
        emptied = _positions((left == 0) & (had > 0))
        if len(emptied):
            name = self._split.classes[int(emptied[0])]
            raise UserError(f"{kind}: this would delete the whole class {name!r}, leave one of its samples")

    def _per_class(self, mask: Tensor) -> Tensor:
        return torch.bincount(self._split.y[mask], minlength=self._split.num_classes)  # [C]


def _refuse(kind: str, ids: Tensor, reason: str) -> None:
    if len(ids):
        raise UserError(f"{kind}: id {int(ids[0])} {reason}")


def _positions(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]


def _new_samples(run: RecordedRun, name: str) -> Split:
    """Read new samples with the options by which the run's own were read."""
    source = dataset[name]
    place = argument(name)
    trained = run.settings.dataset
    is_same_source = dataset[trained.name].name == source.name
    options = dict(trained.options) if is_same_source else {}
    if "test" in source.schema.model_fields and Path(place).is_file():
        options["test"] = 0  # all rows of a single file are new samples
    if "columns" in source.schema.model_fields:  # sparse rows are as wide as the data set, whatever they hold
        options["columns"] = run.split.shape[0]
    split = source(place, options=options, split="train", cache=None)
    return aligned(split, run.samples.data.train)


def _id_values(text: str) -> list[Any]:
    if re.fullmatch(r"\d+(,\d+)*", text):
        return text.split(",")
    file = Path(text)
    if file.suffix != ".parquet":
        return file.read_text().split()
    table = pq.read_table(file)
    column = next((name for name in ("id", "index") if name in table.column_names), None)
    if column is None:
        raise unknown(f"id column of {text!r}", "id", table.column_names)
    return table[column].to_pylist()


def _integer(value: Any) -> int:
    if type(value) not in (int, str):
        raise ValueError(f"{value!r} is no integer")
    return int(value)


def _request(line: str, where: str) -> Request:
    """Return the request of a line; ``where`` names the line in errors."""
    try:
        content = json.loads(line, object_pairs_hook=_without_repetition)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    kinds = [name for name in content if name != "id"] if isinstance(content, dict) else []
    if len(kinds) != 1 or not content.get("id"):
        raise UserError(f"{where} must be an object with one of {', '.join(KINDS)}, and an id of its own")
    (kind,) = kinds
    value = content[kind]
    if kind not in KINDS:
        raise unknown(f"request in {where}", kind, KINDS)
    if kind in ("delete", "restore"):
        if not _is_ids(value):
            raise UserError(f"{where}: {kind} takes a list of ids, not {value!r}")
    elif not isinstance(value, str):
        raise UserError(f"{where}: {kind} takes a text, not {value!r}")
    return Request(kind, value, str(content["id"]))


def _is_ids(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(type(item) is int and abs(item) < 2**63 for item in value)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content

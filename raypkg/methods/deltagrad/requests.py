"""From what a user asks for to a change of the books: ids, conditions, new data, and queues of those."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
from raypkg.data.split import Split, aligned, joined
from raypkg.data.where import matching

from .books import Books, Change
from .ledger import digest

KINDS = ("delete", "delete_where", "restore", "add")


class Request(NamedTuple):
    """One line of a queue.

    Attributes:
        kind: delete or restore (ids), delete_where (a condition) or add (a data set's name).
        value: what of.
        id: by which a queue's request is known, which is answered once; empty on the command line.
    """

    kind: str
    value: Any
    id: str = ""

    @property
    def asked(self) -> dict[str, str]:
        """What the log says of the request: its id, and a digest of what it asks for."""
        value = self.value.tolist() if isinstance(self.value, Tensor) else self.value
        return {"id": self.id, "digest": digest(json.dumps([self.kind, value]).encode())}


def read_ids(given: str) -> Tensor:
    """Return ids given as ``3,14,15`` or in a file: one a line, or the column ``id`` or ``index`` of a parquet file.

    Raises:
        UserError: unreadable, no such column, no integers, or none at all.
    """
    file = Path(given)
    try:
        if re.fullmatch(r"\d+(,\d+)*", given):
            values = given.split(",")
        elif file.suffix == ".parquet":
            table = pq.read_table(file)
            name = next((name for name in ("id", "index") if name in table.column_names), None)
            if name is None:
                raise unknown(f"id column of {str(file)!r}", "id", table.column_names)
            values = table[name].to_pylist()
        else:
            values = file.read_text().split()
        ids = np.array([_integer(value) for value in values], np.int64)
    except (OSError, pa.ArrowException, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise UserError(f"ids in {given!r} cannot be read: {error}") from None
    if not len(ids):
        raise UserError(f"{str(file)!r} holds no ids")
    return torch.from_numpy(ids)


def read_queue(file: Path) -> list[Request]:
    """Return the requests of a queue: lines of JSON such as {"delete": [3, 7], "id": "ticket 12"}.

    Raises:
        UserError: unreadable, a line that is no request, or the same id twice.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the queue {str(file)!r} cannot be read: {error}") from None
    requests = [_request(line, number, file) for number, line in enumerate(lines, 1) if line.strip()]
    for key, count in Counter(request.id for request in requests).items():
        if count > 1:
            raise UserError(f"the queue {str(file)!r} has the id {key!r} {count} times")
    return requests


def change_of(books: Books, requests: Iterable[Request]) -> Change:
    """Return the change that several requests amount to, each checked against what those before it leave.

    Raises:
        UserError: ids that are unknown, repeated or not in use (or in use, to restore), a deletion of everything or of
            a whole class, or new samples that do not fit.
    """
    split, before, active, groups, asked = books.split, books.active, books.active.clone(), list[Split](), []
    for request in requests:
        asked.append(request.asked)
        try:
            if request.kind == "add":
                groups.append(_new_samples(books, request.value))
                split = joined(books.split, *groups)
                before, active = (torch.cat([mask, torch.ones(len(groups[-1])).bool()]) for mask in (before, active))
                continue
            ids = _selected(books, split, active, request)
            active[ids] = request.kind == "restore"
            if request.kind != "restore":
                _check_left(split, before, active, request)
        except UserError as error:
            raise UserError(f"request {request.id!r}: {error}" if request.id else str(error)) from None
    gone, came = (before & ~active).nonzero()[:, 0], (active & ~before).nonzero()[:, 0]
    return Change(gone, came, joined(*groups) if groups else None, tuple(asked))


def unanswered(books: Books, requests: Iterable[Request]) -> list[Request]:
    """Return the requests of a queue that the log does not have yet.

    Raises:
        UserError: one has the id of another that was answered.
    """
    waiting, answered = [], books.answered
    for request in requests:
        if request.id not in answered:
            waiting.append(request)
        elif answered[request.id] != request.asked["digest"]:
            raise UserError(f"the id {request.id!r} belongs to another request, which was answered: give a new one")
    return waiting


def batches(requests: list[Request], size: int) -> Iterator[list[Request]]:
    """Yield requests in order, so many at a time."""
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def _selected(books: Books, split: Split, active: Tensor, request: Request) -> Tensor:
    if request.kind == "delete_where":
        found = torch.from_numpy(matching(split, request.value))
        ids = found[active[found]]
        if not len(ids):
            raise UserError(f"no sample in use meets {request.value!r}")
        return ids
    ids = torch.as_tensor(request.value, dtype=torch.int64)
    unknown_ids = ids[(ids < 0) | (ids >= len(active))]
    if len(unknown_ids):
        raise UserError(f"{request.kind}: id {int(unknown_ids[0])} is unknown, allowed are 0 … {len(active) - 1}")
    values, counts = ids.unique(return_counts=True)
    if counts.max() > 1:
        raise UserError(f"{request.kind}: id {int(values[counts.argmax()])} is given {int(counts.max())} times")
    held_out = books.found.valid[torch.isin(books.found.valid, ids)]
    if len(held_out):
        raise UserError(f"{request.kind}: id {int(held_out[0])} is held out for validation and was never trained on")
    wrong = ids[active[ids] == (request.kind == "restore")]
    if len(wrong):
        state = "in use already" if request.kind == "restore" else "deleted already"
        raise UserError(f"{request.kind}: id {int(wrong[0])} is {state}")
    return ids


def _check_left(split: Split, before: Tensor, active: Tensor, request: Request) -> None:
    if not active.any():
        raise UserError(f"{request.kind}: this would delete every sample")
    left, were = (torch.bincount(split.y[mask], minlength=split.num_classes) for mask in (active, before))
    emptied = ((left == 0) & (were > 0)).nonzero()[:, 0]
    if len(emptied):
        name = split.classes[int(emptied[0])]
        raise UserError(f"{request.kind}: this would delete the whole class {name!r}, leave one of its samples")


def _new_samples(books: Books, name: str) -> Split:
    entry, trained = dataset[name], books.settings.dataset
    options = dict(trained.options) if dataset[trained.name].name == entry.name else {}
    if "test" in entry.schema.model_fields and Path(argument(name)).is_file():
        options["test"] = 0
    if "columns" in entry.schema.model_fields:  # sparse rows are as wide as the data set, whatever they hold
        options["columns"] = books.split.shape[0]
    return aligned(entry(argument(name), options=options, split="train", cache=None), books.found.data.train)


def _request(line: str, number: int, file: Path) -> Request:
    where = f"line {number} of {str(file)!r}"
    try:
        content: Mapping[str, Any] = json.loads(line, object_pairs_hook=_once)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    kinds = [name for name in content if name != "id"] if isinstance(content, dict) else []
    if len(kinds) != 1 or not content.get("id"):
        raise UserError(f"{where} must be an object with one of {', '.join(KINDS)}, and an id of its own")
    if kinds[0] not in KINDS:
        raise unknown(f"request in {where}", kinds[0], KINDS)
    kind, value = kinds[0], content[kinds[0]]
    if kind in ("delete", "restore"):
        if not (isinstance(value, list) and value and all(type(item) is int and abs(item) < 2**63 for item in value)):
            raise UserError(f"{where}: {kind} takes a list of ids, not {value!r}")
    elif not isinstance(value, str):
        raise UserError(f"{where}: {kind} takes a text, not {value!r}")
    return Request(kind, value, str(content["id"]))


def _integer(value: Any) -> int:
    if type(value) not in (int, str):
        raise ValueError(f"{value!r} is no integer")
    return int(value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content

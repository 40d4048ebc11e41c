"""Requests to a recorded run: ids, conditions and queues as users give them, and the change that they amount to."""

import json
import operator
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from raypkg.core.config import regular
from raypkg.core.errors import UserError, unknown
from raypkg.core.registry import argument
from raypkg.data.sources import dataset
from raypkg.data.split import Split, aligned
from raypkg.runs.folder import MODEL, SUMMARY, RunFolder
from raypkg.runs.storage import Storage

from .history import digest
from .journal import Change
from .run import RecordedRun, joined

DONE = {"delete": "deleted", "delete_where": "deleted", "restore": "restored", "add": "new"}  # to samples, by request
KINDS = tuple(DONE)
LIST = re.compile(r"[0-9]+(,[0-9]+)*")  # \d would match the digits of every script
DIGITS = re.compile(r"[0-9]{1,19}")  # as many as the largest id has
COLUMNS = ("id", "index")  # of a parquet file of ids
ALLOWED = "ids are whole numbers from 0 to 2⁶³ − 1"
AUDIT = "audit.parquet"  # of `effray audit`: samples with their influence, worst first
LONGEST = 100  # characters of a name or list that an error shows
# The longer operators come first: COMPARISON tries them in this order.
EQUALITY = {"!=": operator.ne, "=": operator.eq}
OPS = {"<=": operator.le, ">=": operator.ge, **EQUALITY, "<": operator.lt, ">": operator.gt}
AND = re.compile(r"(?<!\s)\s+and\s+", re.IGNORECASE)  # without the lookbehind, long runs of spaces take quadratic time
COMPARISON = re.compile("|".join(OPS))
BLOCK = 1 << 16  # rows read at once
LARGEST = float(np.finfo(np.float32).max)


class Request(NamedTuple):
    """One request, from the command line or a line of a queue."""

    kind: str  # delete or restore (ids), delete_where (a condition) or add (the name of a data set)
    value: Any
    id: str = ""  # identifies a queue's request, which is answered once; empty on the command line


# Ids


def read_ids(text: str) -> list[int]:
    """Return ids given as ``3,14,15`` or by a file: one a line, or parquet with a column ``id`` or ``index``."""
    where = f"ids {text[:LONGEST]!r} (no such file)"
    values: list[Any] = text.split(",")
    if not LIST.fullmatch(text) and os.path.exists(text):
        where, file = f"ids in {text!r}", Path(text)
        try:
            if file.suffix == ".parquet" and file.is_file():
                names = pq.read_schema(file).names
                column = next((name for name in COLUMNS if name in names), None)
                if column is None:
                    raise unknown(f"id column of {text!r}", "id", names)
                values = pq.read_table(file, columns=[column], partitioning=None)[column].to_pylist()
            else:
                values = regular(file).read_text("utf-8-sig").split()
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not values:
        raise UserError(f"{text!r} holds no ids")
    ids = []
    for value in values:
        number = int(value) if isinstance(value, str) and DIGITS.fullmatch(value) else value
        if not _is_id(number):
            raise UserError(f"{where}: {shortened(value)} is no id; {ALLOWED}: 3,14,15, or a file of them, one a line")
        ids.append(number)
    return ids


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63  # True is no id


def id_at(split: Split, position: int) -> int:
    """Return the id of the sample at a position."""
    return position if split.ids is None else int(split.ids[position])


class Removal(NamedTuple):
    """The worst samples of an audit, and the prediction of their removal."""

    audit: str  # name of its run
    ids: list[int]
    change: float  # predicted, of the held-out loss
    on: str  # the held-out samples: "valid" or "test"


def worst_of_audit(folder: RunFolder, root: str, count: int) -> Removal:
    """Return the removal of the worst samples in the latest audit of a run as it is now, among all runs below a root.

    Rows of one id, such as augmented ones, count once and go together. Refuse an audit of another state of the run.
    """
    model = folder.storage.digest(MODEL)
    advice = f"`effray audit {folder.name}` makes one"
    found = {}  # finished audits of runs of this name, by time
    audits = Storage(root) / "audit"
    for name in audits.list():
        audit = RunFolder(audits / name)
        summary = audit.summary
        if summary and summary["audited"] == folder.name:
            found[audit.storage.times()[SUMMARY], name] = (audit, summary)
    if not found:
        raise UserError(f"--from-audit: there is no finished audit of run {folder.name!r}: {advice}")
    fitting = [key for key, (_, summary) in found.items() if summary["audited_model"] == model]
    if not fitting:
        raise UserError(f"--from-audit: run {folder.name!r} has changed since its audit {max(found)[1]!r}: {advice}")
    audit, summary = found[max(fitting)]
    audit.check(AUDIT)
    table = audit.storage.read_table(AUDIT)
    assert table is not None
    ids = table["id"].to_numpy()
    worst = list(dict.fromkeys(ids.tolist()))
    if not 0 < count < len(worst):
        raise UserError(
            f"--from-audit {count}: audit {audit.name!r} ranks {len(worst):,} samples: 1 … {len(worst) - 1}"
        )
    gone = np.isin(ids, worst[:count])
    influences = table["influence"].to_numpy()[gone]
    change = -influences.sum() / (len(ids) - len(influences))
    return Removal(audit.name, worst[:count], float(change), summary["on"])


# Queues


def read_queue(file: Path) -> list[Request]:
    """Return the requests of a queue, a file with lines of JSON such as {"delete": [3, 7], "id": "ticket 12"}."""
    where = f"the queue {str(file)!r}"
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    # Not splitlines, which also splits at characters that a JSON text may hold.
    lines = enumerate(text.split("\n"), 1)
    requests = [_request(line, f"line {number} of {str(file)!r}") for number, line in lines if line.strip()]
    for key, times in Counter(request.id for request in requests).items():
        if times > 1:
            raise UserError(f"{where} has the id {key!r} {times} times")
    return requests


def _request(line: str, where: str) -> Request:
    """Return the request of a line; ``where`` names the line in errors."""

    def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a name occurs twice")
        return content

    try:
        content = json.loads(line, object_pairs_hook=without_repetition)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    kinds = [name for name in content if name != "id"] if isinstance(content, dict) else []
    if len(kinds) != 1 or "id" not in content:
        raise UserError(f"{where} must be an object with one of {', '.join(KINDS)}, and an id of its own")
    (kind,) = kinds
    value, key = content[kind], content["id"]
    if kind not in KINDS:
        raise unknown(f"request in {where}", kind[:LONGEST], KINDS)
    if kind in ("delete", "restore"):
        if not (isinstance(value, list) and value and all(map(_is_id, value))):
            raise UserError(f"{where}: {kind} takes a list of ids, not {shortened(value)}; {ALLOWED}")
    elif not isinstance(value, str):
        raise UserError(f"{where}: {kind} takes a text, not {shortened(value)}")
    # The journal keeps a request's id as a text: 12 and "12" are the same.
    if type(key) is not int and not (isinstance(key, str) and key.strip() and key.isprintable()):
        raise UserError(f"{where}: the id must be a text of printable characters or an integer, not {shortened(key)}")
    return Request(kind, value, str(key))


def unanswered(run: RecordedRun, requests: Iterable[Request]) -> list[Request]:
    """Return the requests of a queue that are not in the journal yet; an id can be answered once."""
    answered = {
        request["id"]: request["digest"] for entry in run.journal.entries for request in entry.get("requests", ())
    }
    waiting = []
    for request in requests:
        if request.id not in answered:
            waiting.append(request)
        elif answered[request.id] != _digest(request):
            raise UserError(f"the id {request.id!r} belongs to another request, which was answered: give a new one")
    return waiting


def _digest(request: Request) -> str:
    return digest(json.dumps([request.kind, request.value]).encode()).hex()


# Conditions


def matching(split: Split, condition: str) -> np.ndarray:
    """Return the positions of the samples that meet all clauses ``NAME OPERATOR VALUE``, joined by ``and``.

    NAME is a column of a table, or else ``label`` (with = and !=, VALUE is a class name).

    >>> split = Split.from_tensors(torch.eye(3), torch.tensor([0, 1, 1]), classes=("cat", "dog"))
    >>> matching(split, "label = dog")
    array([1, 2])
    """
    met = np.ones(len(split), bool)
    for clause in AND.split(condition):
        found = COMPARISON.search(clause)
        name = clause[: found.start()].strip() if found else ""
        value = clause[found.end() :].strip() if found else ""
        if not found or not name or not value:
            example = f"label = {split.classes[0]}"
            raise UserError(f"condition {shortened(clause)} is not of the form NAME OPERATOR VALUE, such as {example}")
        where = f"condition {name} {found[0]} {shortened(value)}"
        compare = OPS[found[0]]
        if name in split.columns:
            try:
                number = float(value)
            except ValueError:
                number = np.nan
            if not abs(number) <= LARGEST:
                raise UserError(f"{where}: needs a number of at most {LARGEST:.3g}, as columns hold them")
            stored = np.float32(number)  # the type of the columns, so that = finds the values of the file
            column = split.columns.index(name)
            for start in range(0, len(split), BLOCK):
                end = min(start + BLOCK, len(split))
                met[start:end] &= compare(split.take(np.arange(start, end))[:, column], stored)
            continue
        if name != "label":
            raise unknown("name in a condition", name[:LONGEST], ("label", *split.columns))
        if found[0] not in EQUALITY:
            raise UserError(f"{where}: labels compare with = and != only")
        if value not in split.classes:
            raise unknown("class", value[:LONGEST], split.classes)
        met &= compare(split.y.numpy(), split.classes.index(value))
    return np.flatnonzero(met)


# Changes


def change_of(run: RecordedRun, requests: Sequence[Request]) -> Change:
    """Return the change that several requests amount to, each checked against the result of those before it.

    The change ends before a request that is refused, unless that is the first. It leads to the weights of one request
    for the same samples. Answered one after another, every step exact, requests lead there up to the order of sums,
    about 1e-15 of the weights. Otherwise they end apart by the errors of the replays, about as far as from retraining.

    Raises:
        UserError: the first request is refused.
    """
    split = run.split
    added: list[Split] = []
    before = run.active
    active = before.clone()
    answered: list[dict[str, Any]] = []
    for request in requests:
        try:
            if request.kind == "add":
                added.append(_new_samples(run, request.value))
                split = joined(run.split, *added)
                chosen = torch.arange(len(active), len(split))
                in_use = torch.ones(len(chosen), dtype=torch.bool)
                before = torch.cat([before, in_use])
                active = torch.cat([active, in_use])
            elif request.kind == "restore":
                chosen = _chosen(run, split, request, ~active, "is in use already")
                active = active.index_fill(0, chosen, True)
            else:
                if request.kind == "delete":
                    chosen = _chosen(run, split, request, active, "is deleted already")
                else:
                    matches = torch.from_numpy(matching(split, request.value))
                    chosen = matches[active[matches]]
                    if not len(chosen):
                        raise UserError(f"no sample in use meets {request.value!r}")
                    if split.ids is not None:  # several rows may stand for one sample: all go together
                        chosen = (torch.isin(split.ids, split.ids[chosen]) & active).nonzero()[:, 0]
                rest = active.index_fill(0, chosen, False)
                if not rest.any():
                    raise UserError(f"{request.kind}: this would delete every sample")
                left = torch.bincount(split.y[rest], minlength=split.num_classes)  # [C]
                for label in split.y[chosen].tolist():
                    if not left[label]:
                        reason = f"this would delete the whole class {split.classes[label]!r}, leave one of its samples"
                        raise UserError(f"{request.kind}: {reason}")
                active = rest
        except UserError as error:
            if answered:
                break
            if not request.id:  # of the command line
                raise
            raise UserError(f"request {request.id!r}: {error}") from None
        answered.append({"id": request.id, "digest": _digest(request), DONE[request.kind]: len(chosen)})
    return Change(before, active, joined(*added) if added else None, tuple(answered))


def _chosen(run: RecordedRun, split: Split, request: Request, changeable: Tensor, otherwise: str) -> Tensor:
    """Return the positions that a request for ids changes.

    Of the positions of each id at least one must be changeable, bool [n]; ``otherwise`` is the reason of the error.
    """
    ids = torch.tensor(request.value, dtype=torch.int64)
    known = torch.arange(len(split)) if split.ids is None else split.ids
    trained = torch.ones(len(split), dtype=torch.bool)
    trained[run.samples.held_out] = False
    values, counts = ids.unique(return_counts=True)
    most = int(counts.max())
    if split.ids is None:
        allowed = f"0 … {len(split) - 1}"
    else:
        allowed = f"those of the data's column of ids, {int(split.ids.min())} … {int(split.ids.max())}"
    never = "is held out for validation and was never trained on"
    # Each check presumes the ones before it.
    for wrong, reason in (
        (ids[~torch.isin(ids, known)], f"is unknown, allowed are {allowed}"),
        (values[counts == most] if most > 1 else values[:0], f"is given {most} times"),
        (ids[~torch.isin(ids, known[trained])], never),
        (ids[~torch.isin(ids, known[trained & changeable])], otherwise),
    ):
        if len(wrong):
            raise UserError(f"{request.kind}: id {int(wrong[0])} {reason}")
    return (torch.isin(known, ids) & trained & changeable).nonzero()[:, 0]


def _new_samples(run: RecordedRun, name: str) -> Split:
    """Read new samples with the options that the run's own were read with."""
    source = dataset[name]
    place = argument(name) if source.name in dataset else ""  # the user's own function has no such part
    trained = run.settings.dataset
    is_same_source = dataset[trained.name].name == source.name
    options = dict(trained.options) if is_same_source else {}
    if "test" in source.schema.model_fields and Path(place).is_file():
        options["test"] = 0  # all rows of a single file are new samples
    if "columns" in source.schema.model_fields:  # sparse rows are as wide as the data set, whatever they hold
        options["columns"] = run.split.shape[0]
    split = source(place, options=options, split="train", cache=None)
    train = run.samples.data.train
    in_form = aligned(split, train, "the new samples")
    if bool(split.columns) != bool(train.columns):
        unnamed = "the data set" if split.columns else "the new samples"
        raise UserError(f"columns of {unnamed} have no names: nothing says that both have the same order")
    return in_form

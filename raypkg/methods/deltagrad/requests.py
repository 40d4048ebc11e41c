"""From what a user asks for to a change of a recorded run."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.registry import argument
from raypkg.data.sources import dataset
from raypkg.data.split import Split, aligned

from .conditions import matching
from .ids import find_ids, id_range
from .joined import joined
from .ledger import digest
from .queues import Request
from .recorded_run import Change, RecordedRun


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
        elif answered[request.id] != _logged(request)["digest"]:
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
            requests=tuple(_logged(request) for request in self._requests),
        )

    def _add(self, samples: Split) -> None:
        self._added.append(samples)
        self._split = joined(self._run.split, *self._added)
        in_use = torch.ones(len(samples), dtype=torch.bool)
        self._before = torch.cat([self._before, in_use])
        self._active = torch.cat([self._active, in_use])

    def _restored(self, value: Sequence[int]) -> Tensor:
        return self._changing("restore", value, ~self._active, "is in use already")

    def _deleted(self, request: Request) -> Tensor:
        if request.kind == "delete_where":
            return self._matching(request.value)
        return self._changing("delete", request.value, self._active, "is deleted already")

    def _matching(self, condition: str) -> Tensor:
        matches = torch.from_numpy(matching(self._split, condition))
        rows = matches[self._active[matches]]
        if not len(rows):
            raise UserError(f"no sample in use meets {condition!r}")
        if self._split.ids is None:
            return rows
        samples = self._split.ids[rows]  # all rows of a sample go with the one that meets the condition
        return _positions(torch.isin(self._split.ids, samples) & self._active)

    def _changing(self, kind: str, value: Sequence[int], changeable: Tensor, otherwise: str) -> Tensor:
        """Return those positions of ids that a request changes.

        Args:
            kind: of the request.
            value: the ids; of the samples that stand for one, at least one must be changeable.
            changeable: which samples it can be asked for, bool [n].
            otherwise: what is wrong with an id that has none of them.

        Raises:
            UserError: an id is unknown, repeated or held out, or cannot be changed.
        """
        ids = torch.tensor(value, dtype=torch.int64)
        found = find_ids(self._split, ids)
        _refuse(kind, ids[found.counts == 0], f"is unknown, allowed are {id_range(self._split)}")
        values, counts = ids.unique(return_counts=True)
        most = int(counts.max())
        if most > 1:
            _refuse(kind, values[counts == most], f"is given {most} times")
        trained = torch.ones(len(self._split), dtype=torch.bool)
        trained[self._run.samples.held_out] = False
        _refuse(kind, ids[found.among(trained) == 0], "is held out for validation and was never trained on")
        changing = changeable & trained
        _refuse(kind, ids[found.among(changing) == 0], otherwise)
        return found.positions[changing[found.positions]]

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


def _logged(request: Request) -> dict[str, str]:
    """Return what the log says of a request: its id, and a digest of what it asks for."""
    content = json.dumps([request.kind, request.value])
    return {"id": request.id, "digest": digest(content.encode())}


def _positions(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]


def _new_samples(run: RecordedRun, name: str) -> Split:
    """Read new samples with the options by which the run's own were read."""
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
    if not isinstance(split, Split):
        raise UserError(f"dataset {name!r} returned a {type(split).__name__}, not a raypkg.data.split.Split")
    train = run.samples.data.train
    in_form = aligned(split, train, "the new samples")
    if bool(split.columns) != bool(train.columns):
        unnamed = "the data set" if split.columns else "the new samples"
        raise UserError(f"columns of {unnamed} have no names: nothing says that both have the same order")
    return in_form

"""Batches of a user's data set, from pairs or from mappings; the ranks that share them; what loaders refuse."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from raypkg.core.errors import Interruption, UserError, shown, unknown
from raypkg.core.seeds import generator, seeded
from raypkg.engine.worker import Worker as Worker  # the processes of a loop, which CREST's passes name too
from raypkg.engine.worker import keep_freed_memory
from raypkg.models.classifier import Tapped

LABELS = "labels"  # in a batch that is a mapping, as those of Hugging Face are
LABEL = "label"  # of many data sets there, which their collators rename
WEIGHTS = "weights"
INDICES = "indices"
TOKENS = "input_ids"  # of a causal language model, whose labels are of the same shape
IGNORED = -100  # label of a token that is not answered
COMPARED = 32  # labels by which data sets are compared


class TappedByForm(Tapped):
    """A module as ``head(features(x))``; x is a tensor, or a mapping of keyword arguments."""

    def logits(self, x: Any) -> Any:
        """Return the output of the module, or the logits in it."""
        if not isinstance(x, Mapping):
            return super().logits(x)
        output = self.module(**x)
        return getattr(output, "logits", output)  # models of Hugging Face return them among other things

    forward = logits


class Batches(Dataset[Any]):
    """Collated batches of a data set by lists of positions; PyTorch's draws follow from the seed and the positions.

    So random augmentation is the same in the main process, in any number of workers, and after resuming.
    """

    def __init__(self, data: Dataset[Any], collate: Callable[[list[Any]], Any], seed: int):
        self.data = data
        self.collate = collate
        self.seed = seed

    def __getitem__(self, positions: list[int]) -> Any:
        if type(self.data) is TensorDataset and self.collate is default_collate:  # the same, without an object a sample
            return [each.index_select(0, torch.tensor(positions, device=each.device)) for each in self.data.tensors]
        together = getattr(self.data, "__getitems__", None)
        with seeded(self.seed, *positions):
            return self.collate(together(positions) if together else [self.data[i] for i in positions])


def as_dataset(samples: Any, taker: str) -> Dataset[Any]:
    """Make a data set of tensors or arrays (x, y); refuse what has no index or length. Errors name the ``taker``."""
    if isinstance(samples, tuple | list) and samples and all(isinstance(each, Tensor | np.ndarray) for each in samples):
        samples = [torch.as_tensor(each) for each in samples]
        if len(samples) != 2 or len(samples[0]) != len(samples[1]):
            raise UserError(f"{taker} takes tensors (x, y) of equal lengths, not {[len(each) for each in samples]}")
        return TensorDataset(*samples)
    if not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")) or isinstance(samples, Mapping):
        kind = type(samples).__name__
        raise UserError(f"{taker} takes a data set with a length that gives samples by index, not a {kind}")
    return samples


def load_batches(
    data: Dataset[Any],
    batches: Sequence[Tensor],
    *,
    seed: int,
    collate_fn: Callable[[list[Any]], Any],
    causal: bool = False,
    **loading: Any,
) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yield inputs, labels int64 [b] and positions int64 [b] of batches of positions.

    Nothing is drawn from PyTorch's global generator. ``loading`` are further arguments of a ``DataLoader``. With
    ``causal``, labels may also be those of a causal language model, [b, l] as "input_ids"; −100 = not answered.

    Raises:
        UserError: batches are neither pairs nor mappings with "labels" or "label", the labels are no integers from 0
            up, the batch's "indices" are not the positions of its samples, or a sample has no answered token.
    """
    keep_freed_memory()  # the next batch needs as much; page faults would take up to 10 % of a short step
    positions = [batch.tolist() for batch in batches]
    rng = generator(seed, "workers")
    loader = DataLoader(Batches(data, collate_fn, seed), batch_size=None, sampler=positions, generator=rng, **loading)
    for batch, indices in zip(loader, batches, strict=True):
        if isinstance(batch, Mapping):
            labels = LABELS if LABELS in batch else LABEL
            if labels not in batch:
                names = ", ".join(map(str, batch))
                raise UserError(f"a batch of the data set has {names}: it needs {LABELS!r} as well")
            y = batch[labels]
            x: Any = {name: value for name, value in batch.items() if name not in (LABELS, LABEL, INDICES)}
            if untensored := next((name for name, value in x.items() if not hasattr(value, "to")), None):
                raise UserError(
                    f"{untensored!r} of a batch is no tensor: of a datasets.Dataset, give with_format('torch')"
                )
            if INDICES in batch:  # the order after collation
                after = torch.as_tensor(batch[INDICES]).cpu()
                if not after.sort().values.equal(indices.sort().values):
                    theirs = f"{shown(after.tolist())} of samples {shown(indices.tolist())}"
                    raise UserError(f"{INDICES} must be the samples' positions in the data set, not {theirs}")
                indices = after
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            x, y = batch
        else:
            raise UserError(f"the data set must return pairs (x, y); a batch is a {type(batch).__name__}")
        is_tensor = isinstance(y, Tensor)
        ids = x[TOKENS] if causal and isinstance(x, Mapping) and TOKENS in x else None
        of_tokens = ids is not None and is_tensor and y.dim() == 2 and y.shape == ids.shape
        used = y[y != IGNORED] if of_tokens else y
        if not is_tensor or (y.dim() != 1 and not of_tokens) or y.is_floating_point() or (len(used) and used.min() < 0):
            given = f"{y.dtype} {list(y.shape)}" if is_tensor else type(y).__name__
            form = "[b]" if ids is None else f"[b], or of tokens {list(ids.shape)} with {IGNORED} for no answer"
            raise UserError(f"labels must be integers from 0 up, {form}; a batch has {given}")
        if len(y) != len(indices):
            raise UserError(f"a batch of {len(indices)} samples has {len(y)} labels after collation")
        if of_tokens and not (answers := (y[:, 1:] != IGNORED).any(dim=1)).all():  # nothing predicts the first token
            silent = int(indices[int(answers.int().argmin())])
            raise UserError(f"sample {silent} has no answered token: its labels are {IGNORED} from the second one on")
        yield x, y.long(), indices


def in_form_of(x: Any, y: Tensor, weights: Tensor, indices: Tensor) -> Any:
    """Return a weighted batch: (x, y, w), or a mapping if x is one."""
    weights = weights.to(y.device)
    return {**x, LABELS: y, WEIGHTS: weights, INDICES: indices} if isinstance(x, Mapping) else (x, y, weights)


def on_device(batch: tuple[Any, Tensor], device: torch.device) -> tuple[Any, Tensor]:
    """Move a batch to a device; x is a tensor, or a mapping of tensors."""
    x, y = batch
    if isinstance(x, Mapping):
        return {name: value.to(device) for name, value in x.items()}, y.to(device)
    return x.to(device), y.to(device)


def some_labels(data: Dataset[Any], collate_fn: Callable[[list[Any]], Any], *, causal: bool = False) -> list[int]:
    """Return labels spread over a data set, or the sums of their tokens, to tell it from another."""
    some = torch.linspace(0, len(data) - 1, COMPARED, dtype=torch.float64).long().unique()  # type: ignore[arg-type]
    _, y, indices = next(load_batches(data, [some], seed=0, collate_fn=collate_fn, causal=causal))
    y = y.clamp_min(0).sum(dim=1) if y.dim() > 1 else y
    return y[indices.argsort()].tolist()


def check_keywords(loader: Callable[..., Any], given: Iterable[str], more: Iterable[str] = ()) -> None:
    """Refuse keyword arguments that neither the class or function nor ``more`` has, with the nearest name."""
    parameters = inspect.signature(loader).parameters.values()
    allowed = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}
    for name in given:
        if name not in allowed.union(more):
            raise unknown(f"argument of {loader.__name__}", name, allowed.union(more))


def check_count(loader: str, **given: Any) -> None:
    """Refuse arguments that are no integers from 1 up."""
    for name, value in given.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{loader}'s {name} = {shown(value)}: must be an integer, 1 or more")


def check_state(loader: str, state: Mapping[str, Any], needed: Iterable[str], settings: Mapping[str, Any]) -> None:
    """Refuse a state of something else, or of a loader with other data or settings than these."""
    for name in needed:
        if not isinstance(state, Mapping) or name not in state:
            raise UserError(f"this is no state of a {loader}: it has no {name!r}")
    for name, theirs in state.get("settings", {}).items():  # older states have none
        if theirs != (ours := settings.get(name)):
            raise UserError(
                f"the checkpoint is of a {loader} with {name} = {shown(theirs)}, this one has {shown(ours)}"
            )


# Ranks


def ranks_here() -> Worker:
    """Return this process's place in the default process group, or alone without one."""
    if dist.is_available() and dist.is_initialized():
        return Worker(dist.get_rank(), dist.get_world_size())
    return Worker()


@contextmanager
def in_touch(ranks: Worker, epoch: int) -> Iterator[None]:
    """Turn a failed collective, such as that of a dead rank, into one clear error."""
    try:
        yield
    except RuntimeError as error:  # PyTorch's errors of process groups are kinds of it
        if ranks.world == 1:
            raise
        reason = str(error).partition("\n")[0]
        lost = f"rank {ranks.rank} of {ranks.world} lost contact with another before epoch {epoch + 1}"
        raise Interruption(f"{lost}: resume from a checkpoint ({reason})") from error


def attempt(ranks: Worker, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return a function's result, or on many ranks its error, which must reach all of them: they would wait."""
    try:
        return function(*arguments)
    except Exception as error:
        if ranks.world == 1:
            raise
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        failure = UserError(f"rank {ranks.rank} of {ranks.world}: {kind}{error}")
        failure.__cause__ = error
        return failure

"""Coresets in a loop of the user's own: a loader that selects, and selects anew, by itself."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler

from raypkg.core.config import validate
from raypkg.core.errors import UserError
from raypkg.core.seeds import derive, generator
from raypkg.core.settings import Reselect
from raypkg.data.coreset import Coreset
from raypkg.models.classifier import Tapped

from .budgets import budget_of, select
from .gradients import HeadView, head_view
from .record import Record
from .reselection import check_schedule
from .rules import coreset, needs_gradients, sizes_itself

KEPT = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")


class CoresetLoader:
    """Yields (x, y, w) from a coreset of a ``DataLoader``'s data, selected by the model at the epochs where it is due.

    Minimise mean(w · loss). Each pass over the loader is an epoch: every sample of the coreset once, in an order drawn
    from the seed, in ⌈k / batch_size⌉ batches as even as possible. Selection sees the samples as the data set returns
    them, random augmentation included; ``scored`` gives it others.

    Args:
        loader: over all of a data set that returns pairs (x, y) by index, y an integer; its batch size, collation and
            workers are kept.
        model: ends in an ``nn.Linear``; its parameters of the moment select, in evaluation mode.
        method: one of `effray methods`, or ``package.module:function``.
        fraction: share of the samples in a coreset; 1 for a method that sizes it itself, such as infobatch.
        epochs: of the whole training.
        every: epochs between selections; 0 = only the first.
        warm: first epochs, on all samples.
        balanced: class by class, in proportion to the classes.
        seed: of the picks and the order.
        scored: the same samples as the loader's, without augmentation.
        options: the method's own.

    Raises:
        UserError: unknown method or option, a value out of range, a loader that leaves samples out or cannot be
            indexed, a model without a linear head.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        model: nn.Module,
        method: str,
        fraction: float,
        *,
        epochs: int,
        every: int = 0,
        warm: int = 0,
        balanced: bool = True,
        seed: int = 0,
        scored: Dataset[Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        given = {"method": method, "fraction": fraction, "every": every, "warm": warm, "balanced": balanced}
        self.settings: Reselect = validate(Reselect, {**given, "options": dict(options or {})})
        check_schedule(self.settings, epochs)
        _check(loader)
        self.loader, self.scored = loader, loader.dataset if scored is None else scored
        self.epochs, self.seed, self.n, self.entry = epochs, seed, len(self.loader.dataset), coreset[method]  # type: ignore[arg-type]
        self.model = Tapped(model) if needs_gradients(self.entry) else None
        self.coreset, self.epoch = Coreset.uniform(torch.arange(self.n)), 0
        self.losses = torch.full((self.n,), torch.inf)
        self._latest = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        """Return the number of batches of the current coreset; a selection that is due may change it."""
        return -(-len(self.coreset) // (self.loader.batch_size or 1))

    def __iter__(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Select if it is due, then yield an epoch's batches."""
        if self.settings.due(self.epoch):
            self.coreset = self._selected()
        self.epoch += 1
        chosen = self.coreset
        order = torch.randperm(len(chosen), generator=generator(self.seed, "shuffle", self.epoch))
        batches = order.tensor_split(len(self))
        loaded = self._load(self.loader.dataset, [chosen.indices[batch] for batch in batches])
        for batch, (x, y) in zip(batches, loaded, strict=True):
            self._latest = chosen.indices[batch]
            yield x, y, chosen.weights[batch].to(y.device)

    def record(self, losses: Tensor) -> None:
        """Keep the losses [b], without weights, of the batch that was yielded last: infobatch prunes by them.

        Raises:
            UserError: not one loss for each sample of the batch.
        """
        if losses.shape != self._latest.shape:
            raise UserError(f"losses {list(losses.shape)} of a batch of {len(self._latest)}: use reduction='none'")
        self.losses[self._latest] = losses.detach().float().cpu()

    def state_dict(self) -> dict[str, Any]:
        """Return what the next epochs depend on, for a checkpoint between epochs."""
        parts = {"indices": self.coreset.indices, "weights": self.coreset.weights}
        return {**parts, "epoch": self.epoch, "losses": self.losses.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: it is of a data set of another size.
        """
        if len(state["losses"]) != self.n:
            raise UserError(f"the checkpoint is of {len(state['losses'])} samples, this data set has {self.n}")
        self.coreset = Coreset(state["indices"], state["weights"])
        self.epoch, self.losses = state["epoch"], state["losses"].clone()

    def _selected(self) -> Coreset:
        settings = self.settings
        return select(
            self._view(self.model) if self.model else self._record(),
            budget_of(settings.fraction, self.n),
            settings.method,
            seed=derive(self.seed, "selection", self.epoch),
            options=settings.options,
            balanced=settings.balanced,
            progress=self.epoch / self.epochs,
        )

    def _view(self, model: Tapped) -> HeadView:
        device = next(model.parameters()).device
        view = head_view(model, ((x.to(device), y.to(device)) for x, y in self._all()))
        if len(view) != self.n:
            raise UserError(f"scored has {len(view)} samples, the loader's data set {self.n}")
        return view

    def _record(self) -> Record:
        if sizes_itself(self.entry):
            if self.epoch > self.settings.warm_epochs and not self.losses.isfinite().any():
                raise UserError(f"{self.settings.method} needs the losses of each batch: call record(losses)")
            return Record(torch.zeros(self.n, dtype=torch.int64), self.losses)  # it sees all classes at once
        return Record(self._y, self.losses)

    @cached_property
    def _y(self) -> Tensor:
        return torch.cat([y for _, y in self._all()])

    def _all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the scored samples in order."""
        parts = torch.arange(len(self.scored)).split(max(256, self.loader.batch_size or 1))  # type: ignore[arg-type]
        return self._load(self.scored, list(parts))

    def _load(self, data: Dataset[Any], order: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        kept: dict[str, Any] = {name: getattr(self.loader, name) for name in KEPT}
        batches = [batch.tolist() for batch in order]
        for batch in DataLoader(data, batch_sampler=batches, collate_fn=self.loader.collate_fn, **kept):
            yield _pair(batch)


def _check(loader: Any) -> None:
    if not isinstance(loader, DataLoader) or not loader.batch_size:
        raise UserError(f"CoresetLoader takes a DataLoader with a batch_size, not {type(loader).__name__}")
    if loader.drop_last or type(loader.sampler) not in (RandomSampler, SequentialSampler):
        sampler = type(loader.sampler).__name__
        raise UserError(
            f"a DataLoader with {sampler} and drop_last={loader.drop_last}: it must give every sample once;"
            " for a part of the data set, use a Subset"
        )


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise UserError(f"the data set must return pairs (x, y); a batch is a {type(batch).__name__}")
    x, y = batch
    if not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point() or (len(y) and int(y.min()) < 0):
        shown = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise UserError(f"labels must be integers from 0 up, [b]; a batch has {shown}")
    return x, y.long()

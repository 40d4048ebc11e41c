"""Coresets in a loop of the user's own: a loader that selects, and selects anew, by itself."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from raypkg.core.errors import UserError
from raypkg.core.seeds import derive, generator
from raypkg.methods.coreset import Coreset
from raypkg.methods.coresets import coreset, needs_gradients, sizes_itself
from raypkg.methods.gradients import HeadView, head_view
from raypkg.methods.record import Record
from raypkg.methods.selection import budget_of, select
from raypkg.models.classifier import Tapped

Order = list[Tensor]  # the samples of each batch, positions in the data set


class CoresetLoader:
    """Yields (x, y, w) from a coreset of a ``DataLoader``'s data, selected by the model at the epochs where it is due.

    Minimise mean(w · loss). Each pass over the loader is an epoch. Selection sees the samples as the data set returns
    them, random augmentation included; ``scored`` gives it others.

    Args:
        loader: its data set returns pairs (x, y) by index; its batch size, collation, workers and pinning are kept.
        model: ends in an ``nn.Linear``; its parameters of the moment select, in evaluation mode.
        method: one of `effray methods`, or ``package.module:function``.
        fraction: share of the samples in a coreset; 1 for a method that sizes it itself, such as infobatch.
        every: epochs between selections; 0 = only the first.
        warm: first epochs, on all samples.
        epochs: of the whole training, for methods that act on its progress, such as infobatch.
        balanced: class by class, in proportion to the classes.
        seed: of the picks and the order.
        scored: the same samples as the loader's, without augmentation.
        options: the method's own.

    Raises:
        UserError: unknown method or option, fraction out of range, a loader that cannot be indexed, a model without
            a linear head.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        model: nn.Module,
        method: str = "gradmatch",
        fraction: float = 0.1,
        *,
        every: int = 0,
        warm: int = 0,
        epochs: int | None = None,
        balanced: bool = True,
        seed: int = 0,
        scored: Dataset[Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        self.entry, self.options = coreset[method], dict(options or {})
        self.entry.options(self.options)
        self.loader, self.scored, self.n = loader, scored or loader.dataset, _length(loader)
        self.method, self.budget, self.every, self.warm = method, budget_of(fraction, self.n), every, warm
        self.epochs, self.balanced, self.seed = epochs, balanced, seed
        if "progress" in self.entry.declares and not epochs:
            raise UserError(f"{method} acts on the progress of the training: give epochs=, its length")
        self.model = Tapped(model) if needs_gradients(self.entry) else None
        self.coreset, self.epoch = Coreset.uniform(torch.arange(self.n)), 0
        self.losses = torch.full((self.n,), torch.inf)

    def __len__(self) -> int:
        return -(-len(self.coreset) // (self.loader.batch_size or 1))

    def __iter__(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Select if it is due, then yield an epoch's batches in an order drawn from the seed."""
        age, self.epoch = self.epoch - self.warm, self.epoch + 1
        if age == 0 or (age > 0 and self.every and age % self.every == 0):
            self.coreset = self._selected()
        shuffled = torch.randperm(len(self.coreset), generator=generator(self.seed, "shuffle", self.epoch))
        batches = shuffled.tensor_split(len(self))
        order = [self.coreset.indices[batch] for batch in batches]
        for batch, indices, (x, y) in zip(batches, order, self._load(self.loader.dataset, order), strict=True):
            self._latest = indices
            yield x, y, self.coreset.weights[batch].to(y.device)

    def record(self, losses: Tensor) -> None:
        """Keep the losses [b], without weights, of the batch that was yielded last: infobatch prunes by them."""
        self.losses[self._latest] = losses.detach().float().cpu()

    def state_dict(self) -> dict[str, Any]:
        """Return what the next epochs depend on, for a checkpoint between epochs."""
        parts = {"indices": self.coreset.indices, "weights": self.coreset.weights}
        return {**parts, "epoch": self.epoch, "losses": self.losses.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.coreset = Coreset(state["indices"], state["weights"])
        self.epoch, self.losses = state["epoch"], state["losses"].clone()

    def _selected(self) -> Coreset:
        samples = self._view(self.model) if self.model else self._record()
        return select(
            samples,
            self.budget,
            self.method,
            seed=derive(self.seed, "selection", self.epoch),
            options=self.options,
            balanced=self.balanced,
            progress=(self.epoch - 1) / self.epochs if self.epochs else 0.0,
        )

    def _view(self, model: Tapped) -> HeadView:
        device = next(model.parameters()).device
        return head_view(model, ((x.to(device), y.to(device)) for x, y in self._all()))

    def _record(self) -> Record:
        alike = sizes_itself(self.entry) or not self.balanced  # then no label is asked for
        y = torch.zeros(self.n, dtype=torch.int64) if alike else torch.cat([y for _, y in self._all()])
        return Record(y, self.losses, torch.full((self.n,), torch.inf))

    def _all(self) -> "DataLoader[Any]":
        return self._load(self.scored, list(torch.arange(self.n).split(max(256, self.loader.batch_size or 1))))

    def _load(self, data: Dataset[Any], order: Order) -> "DataLoader[Any]":
        given = self.loader
        return DataLoader(
            data,
            batch_sampler=_Given(order),
            collate_fn=given.collate_fn,
            num_workers=given.num_workers,
            pin_memory=given.pin_memory,
            worker_init_fn=given.worker_init_fn,
        )


class _Given(Sampler[list[int]]):
    """Batches in a given order."""

    def __init__(self, order: Order):
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[int]]:
        return iter([batch.tolist() for batch in self.order])


def _length(loader: DataLoader[Any]) -> int:
    if not hasattr(loader.dataset, "__len__") or not loader.batch_size:
        raise UserError("CoresetLoader needs a DataLoader with a batch_size over a data set that has a length")
    return len(loader.dataset)

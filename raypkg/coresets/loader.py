"""Coresets in a loop of one's own: a loader that selects by itself, and again whenever a selection is due."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Never

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler

from raypkg.core.config import current_name, validate
from raypkg.core.errors import UserError
from raypkg.core.seeds import derive, generator
from raypkg.core.settings import Reselect
from raypkg.data.coreset import Coreset
from raypkg.models.classifier import Tapped

from .budgets import budget_of, select
from .gradients import HeadView, head_view
from .record import Record, margins_of
from .reselection import check_schedule, idle_target
from .rules import coreset

LOADING = (
    "collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "prefetch_factor",
)  # fmt: skip
LEAST_SCORED = 256  # samples of one forward pass: small batches of the loader would make scoring slow
LABELS = "labels"  # in a batch that is a mapping, as those of Hugging Face are
WEIGHTS = "weights"
INDICES = "indices"
RECORDED = ("losses", "times", "total_margin")  # tensors of the loader, in checkpoints


class TappedByForm(Tapped):
    """A module as ``head(features(x))``; x is a tensor, or a mapping of keyword arguments."""

    def logits(self, x: Any) -> Any:
        """Return the output of the module, or the logits in it."""
        if not isinstance(x, Mapping):
            return super().logits(x)
        output = self.module(**x)
        return getattr(output, "logits", output)  # models of Hugging Face return them among other things


class CoresetLoader:
    """Yields (x, y, w) from a coreset of a ``DataLoader``'s data, selected by the model in the epochs where it is due.

    Minimise mean(w · loss). Each pass over the loader is an epoch: every sample of the coreset once, in an order drawn
    from the seed, in ⌈k / batch_size⌉ batches as even as possible. Selection sees the samples as the data set returns
    them, random augmentation included; with ``scored`` it sees those instead.

    It takes the place of a ``DataLoader`` in one process: in Hugging Face's ``Trainer`` and in Lightning as well, as
    coresets/README.md shows. They request the length of an epoch once, so all epochs should have that of the first.

    Args:
        loader: over all of a data set that returns pairs (x, y) by index, y an integer; its batch size, collation and
            workers are used. A batch may also be a mapping with "labels", which is yielded with "weights" and, for
            ``record``, "indices"; the model takes the others by keywords.
        model: ends in an ``nn.Linear``; it selects in evaluation mode, with its parameters of the moment.
        rule: one of `effray methods`, or ``package.module:function``.
        fraction: share of the samples in a coreset; 1 for a rule that sizes it itself, such as infobatch.
        epochs: of the whole training.
        every_epochs: epochs between selections; 0 = only the first.
        warm_epochs: first epochs, on all samples.
        balanced: class by class, in proportion to the classes.
        seed: of the picks and the order.
        scored: the same samples as the loader's, without augmentation.
        target: samples to select for, of the same form, such as a few clean ones; None = the loader's own. A class of
            which it has none is its own target.
        options: the rule's own.
        former: former names of arguments, refused with the present ones.

    Raises:
        UserError: unknown rule or option, a value out of range, a loader that omits samples or cannot be indexed, a
            target of a rule that has none, a model without a linear head.

    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> samples = torch.utils.data.TensorDataset(x, torch.arange(100) % 2)
    >>> loader = CoresetLoader(DataLoader(samples, batch_size=10), nn.Linear(4, 2), "grand", 0.2, epochs=1)
    >>> [(list(x.shape), float(w.sum())) for x, y, w in loader]
    [([10, 4], 10.0), ([10, 4], 10.0)]
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        model: nn.Module,
        rule: str,
        fraction: float,
        *,
        epochs: int,
        every_epochs: int = 0,
        warm_epochs: int = 0,
        balanced: bool = True,
        seed: int = 0,
        scored: Dataset[Any] | None = None,
        target: Dataset[Any] | None = None,
        options: Mapping[str, Any] | None = None,
        **former: Never,
    ):
        for name in former:
            if now := current_name(Reselect, name):
                raise UserError(f"CoresetLoader's {name} is now called {now}")
            raise TypeError(f"CoresetLoader got an unexpected keyword argument {name!r}")
        when = {"every_epochs": every_epochs, "warm_epochs": warm_epochs}
        chosen = {"rule": rule, "fraction": fraction, "balanced": balanced, "options": dict(options or {}), **when}
        self.settings: Reselect = validate(Reselect, chosen)
        check_schedule(self.settings, epochs)
        if not isinstance(loader, DataLoader) or not loader.batch_size:
            raise UserError(f"CoresetLoader takes a DataLoader with a batch_size, not {type(loader).__name__}")
        if loader.drop_last or type(loader.sampler) not in (RandomSampler, SequentialSampler):
            given = f"{type(loader.sampler).__name__} and drop_last={loader.drop_last}"
            hint = "for a part of the data set, use a Subset"
            raise UserError(f"a DataLoader with {given}: it must give every sample once; {hint}")
        self.loader = loader
        self.batch_size = loader.batch_size
        self.scored = loader.dataset if scored is None else scored
        self.rule = coreset[rule]
        if target is not None and not self.rule.has_target:
            raise idle_target(self.rule, "target")
        self.target = target
        self.model = TappedByForm(model) if self.rule.sees == "gradients" else None
        self.epochs = epochs
        self.seed = seed
        self.n = len(loader.dataset)  # type: ignore[arg-type]  # its sampler shows that it is indexed
        self.epoch = 0
        self.coreset = Coreset.uniform(torch.arange(self.n))
        self.losses = torch.full((self.n,), torch.inf)
        self.times = torch.zeros(self.n)  # that a loss was recorded
        self.total_margin = torch.zeros(self.n)
        self._latest = torch.empty(0, dtype=torch.int64)  # samples of the batch that was yielded last

    def __len__(self) -> int:
        """Return the number of batches of the coming pass, at most; a rule that sizes its coreset may need fewer."""
        size = len(self.coreset)
        if self.settings.due(self.epoch):
            size = budget_of(self.settings.fraction, self.n)
        return self._batches_of(size)

    def __iter__(self) -> Iterator[Any]:
        """Select if it is due, then yield an epoch's batches."""
        if self.settings.due(self.epoch):
            self.coreset = self._select()
        self.epoch += 1
        in_use = self.coreset  # another pass may select meanwhile
        rng = generator(self.seed, "shuffle", self.epoch)
        order = torch.randperm(len(in_use), generator=rng)
        batches = order.tensor_split(self._batches_of(len(in_use)))
        loaded = self._load(self.loader.dataset, [in_use.indices[batch] for batch in batches])
        for batch, (x, y) in zip(batches, loaded, strict=True):
            self._latest = in_use.indices[batch]
            weights = in_use.weights[batch].to(y.device)
            if isinstance(x, Mapping):
                yield {**x, LABELS: y, WEIGHTS: weights, INDICES: self._latest}
            else:
                yield x, y, weights

    def record(self, losses: Tensor, indices: Tensor | None = None) -> None:
        """Keep the losses of a batch, without weights: infobatch prunes by them, ccs by the margins they tell.

        Args:
            losses: [b].
            indices: of the batch, as it was yielded with them; None = the batch that was yielded last, which is another
                one if batches are fetched ahead.

        Raises:
            UserError: not one loss for each sample of the batch.
        """
        indices = self._latest if indices is None else indices.cpu()
        if losses.shape != indices.shape:
            shape = list(losses.shape)
            raise UserError(f"losses {shape} of a batch of {len(indices)}: use reduction='none'")
        losses = losses.detach().float().cpu()
        self.losses[indices] = losses
        self.times[indices] += 1
        self.total_margin[indices] += margins_of(losses)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint between epochs."""
        recorded = {name: getattr(self, name).clone() for name in RECORDED}
        return {"indices": self.coreset.indices, "weights": self.coreset.weights, "epoch": self.epoch, **recorded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: it is of a data set of another size.
        """
        size = len(state["losses"])
        if size != self.n:
            raise UserError(f"the checkpoint is of {size} samples, this data set has {self.n}")
        self.coreset = Coreset(state["indices"], state["weights"])
        self.epoch = state["epoch"]
        for name in RECORDED:
            setattr(self, name, state[name].clone())

    def _select(self) -> Coreset:
        settings = self.settings
        target = None
        if self.model is None:
            samples: HeadView | Record = self._record()
        else:
            samples = self._view(self.model, self.scored)
            if len(samples) != self.n:
                raise UserError(f"scored has {len(samples)} samples, the loader's data set {self.n}")
            target = None if self.target is None else self._view(self.model, self.target)
        return select(
            samples,
            budget_of(settings.fraction, self.n),
            settings.rule,
            seed=derive(self.seed, "selection", self.epoch),
            options=settings.options,
            target=target,
            balanced=settings.balanced,
            progress=self.epoch / self.epochs,
        )

    def _view(self, model: TappedByForm, data: Dataset[Any]) -> HeadView:
        device = next(model.parameters()).device
        return head_view(model, (on_device(batch, device) for batch in self._in_order(data)))

    def _record(self) -> Record:
        if not self.rule.sizes_itself:
            mean = self.total_margin / self.times.clamp(min=1)
            return Record(self._y, self.losses, margins=mean.where(self.times > 0, torch.inf))
        trained = self.epoch > self.settings.warm_epochs
        if trained and not self.losses.isfinite().any():
            raise UserError(f"{self.settings.rule} needs the losses of each batch: call record(losses)")
        no_labels = torch.zeros(self.n, dtype=torch.int64)  # it sees all classes at once: no pass over the data
        return Record(no_labels, self.losses)

    @cached_property
    def _y(self) -> Tensor:
        return torch.cat([y for _, y in self._in_order(self.scored)])

    def _in_order(self, data: Dataset[Any]) -> Iterator[tuple[Any, Tensor]]:
        positions = torch.arange(len(data))  # type: ignore[arg-type]  # it is indexed, like the loader's
        return self._load(data, list(positions.split(max(LEAST_SCORED, self.batch_size))))

    def _batches_of(self, size: int) -> int:
        return math.ceil(size / self.batch_size)

    def _load(self, data: Dataset[Any], batches: list[Tensor]) -> Iterator[tuple[Any, Tensor]]:
        same = {name: getattr(self.loader, name) for name in LOADING}
        return load_batches(data, batches, **same)


def load_batches(data: Dataset[Any], batches: Sequence[Tensor], **loading: Any) -> Iterator[tuple[Any, Tensor]]:
    """Yield inputs and labels int64 [b] of batches of positions; ``loading`` are arguments of a ``DataLoader``.

    Raises:
        UserError: batches are neither pairs nor mappings with "labels", or the labels are no integers from 0 up.
    """
    positions = [batch.tolist() for batch in batches]
    for batch in DataLoader(data, batch_sampler=positions, **loading):
        if isinstance(batch, Mapping):
            if LABELS not in batch:
                names = ", ".join(map(str, batch))
                raise UserError(f"a batch of the data set has {names}: it needs {LABELS!r} as well")
            x: Any = {name: value for name, value in batch.items() if name != LABELS}
            y = batch[LABELS]
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            x, y = batch
        else:
            raise UserError(f"the data set must return pairs (x, y); a batch is a {type(batch).__name__}")
        is_tensor = isinstance(y, Tensor)
        if not is_tensor or y.dim() != 1 or y.is_floating_point() or (len(y) and int(y.min()) < 0):
            given = f"{y.dtype} {list(y.shape)}" if is_tensor else type(y).__name__
            raise UserError(f"labels must be integers from 0 up, [b]; a batch has {given}")
        yield x, y.long()


def on_device(batch: tuple[Any, Tensor], device: torch.device) -> tuple[Any, Tensor]:
    """Move a batch to a device; x is a tensor, or a mapping of tensors."""
    x, y = batch
    if isinstance(x, Mapping):
        return {name: value.to(device) for name, value in x.items()}, y.to(device)
    return x.to(device), y.to(device)

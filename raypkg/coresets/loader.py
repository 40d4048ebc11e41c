"""Coresets in a loop of one's own: a loader that selects by itself, and again whenever a selection is due."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler

from raypkg.core.config import validate
from raypkg.core.errors import UserError, as_arguments, described, shown
from raypkg.core.seeds import derive, generator
from raypkg.core.settings import Reselect
from raypkg.data.coreset import Coreset
from raypkg.engine.worker import CPU, Worker
from raypkg.models.classifier import in_mode

from .batches import (
    LABELS,
    TappedByForm,
    attempt,
    check_count,
    check_state,
    in_form_of,
    in_touch,
    load_batches,
    on_device,
    ranks_here,
    some_labels,
)
from .budgets import budget_of, select
from .gradients import HeadView, gradient_norms, head_view
from .record import Record, Rows, margins_of
from .rules import coreset
from .sharded import check_schedule, idle_target

LOADING = (
    "collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "prefetch_factor",
)  # fmt: skip
LEAST_SCORED = 256  # samples of one forward pass: small batches of the loader would make scoring slow
RECORDED = ("losses", "times", "total_margin")  # tensors of the loader, in checkpoints


class CoresetLoader:
    """Yields (x, y, w) from a coreset of a ``DataLoader``'s data, selected by the model in the epochs where it is due.

    Minimise mean(w · loss). Each pass over the loader is an epoch: every sample of the coreset once, in an order drawn
    from the seed, in ⌈k / batch_size⌉ batches as even as possible. Selection sees the samples as the data set returns
    them, random augmentation included; with ``scored`` it sees those instead.

    In an initialised process group of R ranks, each computes its share of what a rule sees, and the picks are those of
    one rank. A batch has up to R · batch_size samples, of which each rank yields its share. Shares of a batch that R
    does not divide differ by one sample; their weights are scaled so that the average over ranks of mean(w · loss) is
    that of the whole batch. All ranks have as many batches. The model must be equal on all of them, apart from its
    buffers (batch norm's), which become those of the first rank before a selection. All ranks must iterate together.

    It takes the place of a ``DataLoader`` in Hugging Face's ``Trainer`` and in Lightning as well, as
    coresets/README.md shows. They request the length of an epoch once, so all epochs should have that of the first.

    Args:
        loader: over all of a data set that returns pairs (x, y) by index, y an integer; its batch size, collation and
            workers are used; they draw from generators of the loader's own. A batch may also be a mapping with
            "labels" (or "label"), which is yielded with "weights" and, for ``record``, "indices"; the model takes the
            others by keywords. A collation that reorders samples must keep "indices", which the data set gives each.
            For a causal language model, "labels" are [b, l] as "input_ids", −100 where a token is not answered. Such
            samples have no classes, and losses are means over answered tokens. No rule can see them by a head.
        model: ends in an ``nn.Linear``, unless the rule sees other things; it selects in evaluation mode, with its
            parameters of the moment.
        rule: one of `effray methods`, or ``package.module:function``.
        fraction: share of the samples in a coreset; 1 for a rule that sizes it itself, such as infobatch.
        epochs: of the whole training; a pass beyond them is refused.
        every_epochs: epochs between selections; 0 = only the first.
        warm_epochs: first epochs, on all samples.
        balanced: class by class, in proportion to the classes.
        seed: of the picks and the order.
        scored: the same samples as the loader's, without augmentation.
        target: samples to select for, of the same form, such as a few clean ones; None = the loader's own. A class of
            which it has none is its own target.
        rows: function (model, batches) that returns a row of each sample, float [n, d], for rules that select by rows:
            ``raypkg.language.state_rows`` for rds_plus. Batches are mappings with labels, or the x of pairs. The model
            is in evaluation mode.
        options: the rule's own.

    Raises:
        UserError: unknown rule or option, a value out of range, a loader that omits samples or cannot be indexed, a
            target or rows of a rule that has none, a model or labels without a linear head, ranks that disagree on data
            or settings.
        Interruption: another rank died, or did not answer within the timeout of the process group.

    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> samples = torch.utils.data.TensorDataset(x, torch.arange(100) % 2)
    >>> loader = CoresetLoader(DataLoader(samples, batch_size=10), nn.Linear(4, 2), "grand", 0.2, epochs=1)
    >>> [(list(x.shape), float(w.sum())) for x, y, w in loader]
    [([10, 4], 10.0), ([10, 4], 10.0)]
    """

    @as_arguments("select")
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
        rows: Callable[[nn.Module, Iterator[Any]], Tensor] | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        check_count("CoresetLoader", epochs=epochs)
        when = {"every_epochs": every_epochs, "warm_epochs": warm_epochs}
        chosen = {"rule": rule, "fraction": fraction, "balanced": balanced, "options": dict(options or {}), **when}
        self.settings: Reselect = validate(Reselect, chosen)
        self.rule = coreset[rule]
        by_rows = self.rule.sees == "rows"
        if by_rows == (rows is None):
            missing = "by rows of a model: give rows, a function (model, batches) such as raypkg.language.state_rows"
            raise UserError(f"{rule} selects {missing if by_rows else 'by no rows: rows would do nothing'}")
        self.rows = rows
        check_schedule(self.settings, epochs, has_rows=by_rows)
        if not isinstance(loader, DataLoader) or not loader.batch_size:
            raise UserError(f"CoresetLoader takes a DataLoader with a batch_size, not {type(loader).__name__}")
        sampler = loader.sampler
        whole = type(sampler) in (RandomSampler, SequentialSampler) and len(sampler) == len(loader.dataset)  # type: ignore[arg-type]
        if loader.drop_last or not whole or getattr(sampler, "replacement", False):
            given = f"{type(sampler).__name__} and drop_last={loader.drop_last}"
            hint = "for a part of the data set, use a Subset"
            raise UserError(f"a DataLoader with {given}: it must give every sample once; {hint}")
        self.loader = loader
        self.batch_size = loader.batch_size
        self.scored = loader.dataset if scored is None else scored
        if target is not None and not self.rule.has_target:
            raise idle_target(self.rule, "target")
        for what, data in (("data set", loader.dataset), ("target", target)):
            if data is not None and not len(data):  # type: ignore[arg-type]
                raise UserError(f"the {what} has no samples")
        self.target = target
        plain = model.module if isinstance(model, DistributedDataParallel) else model  # it would communicate
        self.model = TappedByForm(plain) if self.rule.sees == "gradients" else plain if by_rows else None
        self.epochs = epochs
        self.seed = seed
        self.n = len(loader.dataset)  # type: ignore[arg-type]  # its sampler shows that it is indexed
        self.epoch = 0
        self.coreset = Coreset.uniform(torch.arange(self.n))
        self.losses = torch.full((self.n,), torch.inf)
        self.times = torch.zeros(self.n)  # that a loss was recorded
        self.total_margin = torch.zeros(self.n)
        self._y: Tensor | None = None  # labels of this rank's share, if the rule sees nothing else of the samples
        self._latest = torch.empty(0, dtype=torch.int64)  # samples of the batch that was yielded last
        self._position = 0  # samples of the epoch in progress that all ranks have been given; 0 = between epochs
        self._resumes = False  # the next pass is the rest of that epoch
        self._pending: list[tuple[Tensor, Tensor]] = []  # indices and losses that other ranks have not seen

    def __len__(self) -> int:
        """Return the number of batches of the epoch to come, or of all of the one that was resumed in its middle.

        A rule that sizes its coreset itself may need fewer.
        """
        size = len(self.coreset)
        if self.settings.due(self.epoch) and not self._resumes:
            size = budget_of(self.settings.fraction, self.n)
        return self._batches_of(size, ranks_here().world)

    def __iter__(self) -> Iterator[Any]:
        """Select if it is due, then yield an epoch's batches; after ``load_state_dict``, the rest of its epoch."""
        ranks = ranks_here()
        if self.epoch >= self.epochs and not self._resumes:
            raise UserError(f"all {self.epochs} epochs of this CoresetLoader are done: give more epochs")
        with in_touch(ranks, self.epoch):
            if ranks.world > 1:
                self._meet(ranks)
            if (n := len(self.loader.dataset)) != self.n:  # type: ignore[arg-type]
                raise UserError(f"the data set had {self.n} samples and now has {n}: its length must not change")
            start = self._position if self._resumes else 0
            if not start and self.settings.due(self.epoch):
                self.coreset = self._select(ranks)
        in_use = self.coreset  # another pass may select meanwhile
        epoch = self.epoch if start else self.epoch + 1
        order = torch.randperm(len(in_use), generator=generator(self.seed, "shuffle", epoch - 1))  # as a run's
        rest = order[start:]
        if 0 < len(rest) < ranks.world:
            raise UserError(f"{len(rest)} samples of an epoch cannot be shared by {ranks.world} ranks: use fewer ranks")
        self.epoch, self._resumes = epoch, False
        batches = rest.tensor_split(self._batches_of(len(rest), ranks.world)) if len(rest) else ()
        shares = [in_use.indices[batch.tensor_split(ranks.world)[ranks.rank]] for batch in batches]
        weight_of = torch.zeros(n).index_copy_(0, in_use.indices, in_use.weights)
        loaded = self._load(self.loader.dataset, shares, "train", epoch)
        for batch, (x, y, indices) in zip(batches, loaded, strict=True):
            weights = weight_of[indices] * (len(indices) * ranks.world / len(batch))
            if epoch == self.epoch:  # no other pass has begun
                self._latest = indices
                self._position = start = start + len(batch)
            yield in_form_of(x, y, weights, indices)
        if epoch == self.epoch:
            self._position = 0

    def finish_epoch(self) -> None:
        """Finish the epoch if its last batch was yielded, for trainers that request no batch after the last one."""
        if self._position == len(self.coreset):
            self._position, self._resumes = 0, False

    def record(self, losses: Tensor, indices: Tensor | None = None) -> None:
        """Record the losses of a batch, for rules that select by them.

        On many ranks each records its own batches; the others see them at the start of the next epoch.

        Args:
            losses: [b], with reduction="none"; unweighted.
            indices: "indices" of the batch; None = those of the batch that was yielded last.

        Raises:
            UserError: not one loss for each sample of the batch.
        """
        indices = self._latest if indices is None else indices.cpu()
        if losses.shape != indices.shape:
            shape = list(losses.shape)
            raise UserError(f"losses {shape} of a batch of {len(indices)}: use reduction='none'")
        seen = (indices, losses.detach().float().cpu())
        if ranks_here().world > 1:
            self._pending.append(seen)
        else:
            self._add(*seen)

    def _add(self, indices: Tensor, losses: Tensor) -> None:
        self.losses[indices] = losses
        self.times[indices] += 1
        self.total_margin[indices] += margins_of(losses)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, between epochs or between two batches of one.

        It counts batches that were yielded, not those that workers fetched ahead. On many ranks, save that of each. The
        first rank's suffices for all, but then records of the others from the epoch in progress are lost.
        """
        recorded = {name: getattr(self, name).clone() for name in RECORDED}
        pending = [torch.cat(parts) for parts in zip(*self._pending, strict=True)]
        place = {"epoch": self.epoch, "position": self._position, "rank": ranks_here().rank, "pending": pending}
        picked = {"indices": self.coreset.indices, "weights": self.coreset.weights}
        return {"settings": self._fixed, **picked, **place, **recorded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; the next pass is the rest of its epoch, or the next epoch if nothing is left.

        The number of ranks, the batch size and the epochs may differ from those of the checkpoint.

        Raises:
            UserError: it is of other data, rule, schedule or seed, or of something else.
        """
        check_state("CoresetLoader", state, ("indices", "weights", "epoch", *RECORDED), self._fixed)
        self.coreset = Coreset(state["indices"], state["weights"])
        self.epoch = state["epoch"]
        self._position = state.get("position", 0)  # older states are from between epochs
        self._resumes = self._position > 0
        for name in RECORDED:
            setattr(self, name, state[name].clone())
        self._pending = []
        if state.get("pending") and state["rank"] == ranks_here().rank:
            indices, losses = state["pending"]
            self.record(losses, indices)

    def _meet(self, ranks: Worker) -> None:
        """Exchange the records of all ranks; refuse ranks that disagree on data, settings or progress."""
        mine = attempt(ranks, self._facts)
        everyone = ranks.gather((mine, self._pending))
        for facts in (mine, *(facts for facts, _ in everyone)):  # its own error first: it has a cause
            if isinstance(facts, UserError):
                raise facts
        for rank, (facts, pending) in enumerate(everyone):
            for name, agreed in everyone[0][0].items():
                if facts[name] != agreed:
                    theirs = f"{shown(agreed)} on rank 0 and {shown(facts[name])} on rank {rank}"
                    raise UserError(f"{name} must be equal on all ranks, not {theirs}")
            for seen in pending:
                self._add(*seen)
        self._pending = []

    @cached_property
    def _fixed(self) -> dict[str, Any]:
        """Data and settings, equal on all ranks and in a checkpoint."""
        data = {"samples": self.n, "labels": some_labels(self.loader.dataset, self.loader.collate_fn, causal=True)}
        return {**data, **self.settings.model_dump(), "seed": self.seed}

    def _facts(self) -> dict[str, Any]:
        """Return the facts that must be equal on all ranks."""
        start = self._position if self._resumes else 0
        total = 0.0
        if self.model is not None and self.settings.due(self.epoch):
            total = sum(float(parameter.detach().double().sum()) for parameter in self.model.parameters())
        own = {name: getattr(self, name) for name in ("epochs", "batch_size", "epoch")}
        own |= {"samples": len(self.loader.dataset), "position in the epoch": start}  # type: ignore[arg-type]
        return {**self._fixed, **own, "the sum of the model's parameters": str(total)}

    def _select(self, ranks: Worker) -> Coreset:
        """Select on the first rank, by the shares that all ranks computed; an error on one is raised on all."""
        if len(self.scored) != self.n:  # type: ignore[arg-type]
            raise UserError(f"scored has {len(self.scored)} samples, the loader's data set {self.n}")  # type: ignore[arg-type]
        if self.model is not None:
            ranks.share(self.model.buffers())
        mine = attempt(ranks, self._share, ranks)
        if ranks.world == 1:
            return self._picked([mine])
        shares: list[Any] = [None] * ranks.world
        dist.gather_object(mine, None if ranks.rank else shares)
        picked = ranks.first(None if ranks.rank else attempt(ranks, self._picked, shares))
        for outcome in (mine, picked):
            if isinstance(outcome, UserError):
                raise outcome
        return picked

    def _share(self, ranks: Worker) -> list[Any]:
        """Return the views of this rank's share of the samples and of the target, their rows, or the samples' labels.

        A share has whole batches, which one rank alone would compute in the same way, bit for bit.
        """
        if self.rule.sizes_itself:  # it sees all classes at once: no pass over the data
            return [None if ranks.rank else torch.zeros(self.n, dtype=torch.int64)]
        if self._y is not None:
            return [self._y]
        shares: list[Any] = []
        for data in [self.scored] if self.target is None else [self.scored, self.target]:
            # A language model's batches must not be larger than in training: their activations would not fit.
            size = self.batch_size if self.rows else max(LEAST_SCORED, self.batch_size)
            batches = torch.arange(len(data)).split(size)  # type: ignore[arg-type]
            first, end = (len(batches) * rank // ranks.world for rank in (ranks.rank, ranks.rank + 1))
            if first == end:
                shares.append(None)
                continue
            seen: list[Tensor] = []
            loaded = self._seen(data, batches[first:end], seen)
            share: Any
            if self.model is None:  # labels of tokens are all of one class
                share = torch.cat([y if y.dim() == 1 else torch.zeros(len(y), dtype=torch.int64) for _, y in loaded])
            elif self.rows:
                inputs = ({**x, LABELS: y} if isinstance(x, Mapping) else x for x, y in loaded)
                with in_mode(self.model, training=False):
                    share = self.rows(self.model, inputs)
                n = sum(map(len, seen))
                if not isinstance(share, Tensor) or len(share) != n:  # ``Rows`` refuses other forms
                    raise UserError(f"rows returned {described(share)} for {n} samples: must be float [n, d]")
                share = share.detach().cpu()
            else:
                share = head_view(self.model, loaded)
            order = torch.cat(seen).argsort()
            shares.append(share if (order.diff() == 1).all() else share[order])
        if self.model is None:
            self._y = shares[0]  # labels
        return shares

    def _seen(self, data: Dataset[Any], batches: Sequence[Tensor], seen: list[Tensor]) -> Iterator[tuple[Any, Tensor]]:
        """Yield batches for a selection, on the model's device, and note their positions."""
        for x, y, indices in self._load(data, batches, "selection", self.epoch):
            seen.append(indices)
            yield on_device((x, y), self._device)

    @property
    def _device(self) -> torch.device:
        return CPU if self.model is None else next(self.model.parameters()).device

    def _picked(self, shares: Sequence[Any]) -> Coreset:
        for share in shares:
            if isinstance(share, UserError):
                raise share
        views = [[part for part in parts if part is not None] for parts in zip(*shares, strict=True)]
        settings, target = self.settings, None
        if self.model is None:
            y, losses = torch.cat(views[0]), self.losses
            margins = (self.total_margin / self.times.clamp(min=1)).where(self.times > 0, torch.inf)
            if self.rule.sizes_itself and self.epoch > settings.warm_epochs and not losses.isfinite().any():
                raise UserError(f"{settings.rule} needs the losses of each batch: call record(losses)")
            samples: HeadView | Record | Rows = Record(y, losses, margins=None if self.rule.sizes_itself else margins)
        else:
            join: Any = torch.cat if self.rows else HeadView.concat
            joined = [parts[0] if len(parts) == 1 else join(parts) for parts in views]
            samples, target = [*(map(Rows, joined) if self.rows else joined), None][:2]
        picked = select(
            samples,
            budget_of(settings.fraction, self.n),
            settings.rule,
            seed=derive(self.seed, "selection", self.epoch),
            options=settings.options,
            target=target,
            balanced=settings.balanced,
            progress=self.epoch / self.epochs,
            full_norms=self._full_norms,
            device=self._device,
        )
        return picked.part(picked.indices.argsort())

    def _full_norms(self, positions: Tensor) -> Tensor:
        """Return the norms of the full gradients at ascending positions, all computed on the first rank."""
        seen: list[Tensor] = []
        batches = positions.split(max(LEAST_SCORED, self.batch_size))
        norms = gradient_norms(self.model, self._seen(self.scored, batches, seen))  # type: ignore[arg-type]
        return norms[torch.cat(seen).argsort()]

    def _batches_of(self, size: int, world: int) -> int:
        return max(1, min(math.ceil(size / (self.batch_size * world)), size // world))  # no rank without a sample

    def _load(
        self, data: Dataset[Any], batches: Sequence[Tensor], purpose: str, epoch: int
    ) -> Iterator[tuple[Any, Tensor, Tensor]]:
        same = {name: getattr(self.loader, name) for name in LOADING}
        for x, y, indices in load_batches(data, batches, seed=derive(self.seed, purpose, epoch), causal=True, **same):
            if y.dim() > 1 and self.rule.sees == "gradients":
                by_rows = ", ".join(name for name in coreset.names if coreset[name].sees == "rows")
                able = f"give random, infobatch, ccs or, with rows, {by_rows}"
                raise UserError(f"{self.rule.name} selects by a classifier's head, which labels of tokens lack: {able}")
            yield x, y, indices

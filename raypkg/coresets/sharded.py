"""Selecting a coreset with a model's gradients, each holder working on the classes it holds.

Forward passes go class by class, so a class meets the same batches, hence the same picks, wherever it is held.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from raypkg.core.settings import Model, Select
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.costs import Cost
from raypkg.engine.loop import autocast
from raypkg.engine.shards import Shard, Shards
from raypkg.engine.worker import memory_bound
from raypkg.models import build_model

from .budgets import ClassSamples, budget_of, class_budgets, select, select_class, select_each
from .gradients import HeadView, head_view
from .record import Record
from .rules import coreset
from .target import TargetSamples, target_of


@dataclass(frozen=True)
class Selection:
    """A coreset with what it was picked by.

    Attributes:
        coreset: positions in the training split, ascending, with weights.
        indices: all samples that took part, ascending, int64 [n].
        scores: their last-layer gradient norms, float32 [n]; None where no gradient was computed.
        cost: the bill over all holders.
    """

    coreset: Coreset
    indices: Tensor
    scores: Tensor | None
    cost: Cost


class Scorer(Protocol):
    """The model whose gradients select."""

    def view(self, shard: Shard, indices: Tensor) -> HeadView:
        """Return the HeadView of the indices in one forward pass."""


@dataclass(frozen=True)
class LiveModel:
    """A model of this process, as it is now."""

    model: nn.Module
    precision: str

    def view(self, shard: Shard, indices: Tensor) -> HeadView:
        """Return the HeadView of the indices in one forward pass."""
        split = shard.train
        with autocast(self.precision, shard.device):
            batches = plain_batches(split, indices, shard.device, dtype=dtype_of(self.model))
            return head_view(self.model, batches)


@dataclass(frozen=True)
class SentModel:
    """A model in a form that travels: settings and parameters as arrays, built where it arrives."""

    settings: Model
    shape: tuple[int, ...]
    num_classes: int
    parameters: Mapping[str, np.ndarray]
    precision: str

    @classmethod
    def of(cls, settings: Model, split: Split, state: Mapping[str, Tensor], precision: str) -> "SentModel":
        """Return a model for the samples of a split, by its settings and its state."""
        parameters = {name: value.cpu().numpy() for name, value in state.items()}
        return cls(settings, split.shape, split.num_classes, parameters, precision)

    @cached_property
    def _built(self) -> nn.Module:
        chosen = self.settings
        model = build_model(chosen.name, self.shape, self.num_classes, seed=0, options=chosen.options)
        state = {name: torch.tensor(value) for name, value in self.parameters.items()}
        model.load_state_dict(state)  # every weight: the seed above does not matter
        return model

    def view(self, shard: Shard, indices: Tensor) -> HeadView:
        """Return the HeadView of the indices in one forward pass."""
        model = self._built.to(shard.device).to(memory_format=torch.channels_last)
        return LiveModel(model, self.precision).view(shard, indices)


def select_coreset(
    shards: Shards,
    scorer: Scorer,
    settings: Select,
    record: Record,
    indices: Tensor,
    *,
    seed: int,
    progress: float = 0.0,
) -> Selection:
    """Select a coreset of ``indices`` on the shards that hold them, or by the record where that is all it takes.

    Args:
        shards: hold the indices, whole classes each.
        scorer: the model to take gradients of.
        settings: rule, fraction, balance, weights, target and the rule's options.
        record: labels of the training split, and what training has seen of it.
        indices: the samples to select from, int64 [n].
        seed: names every draw.
        progress: share of the training that is done.

    Raises:
        UserError: unknown rule, bad options, gradients that are not finite, or a class without target samples.
    """
    rule = coreset[settings.rule]
    budget = budget_of(settings.fraction, len(indices))
    if rule.sees == "record":
        parts = [_from_record(record, indices, settings, budget, seed, progress)]
    elif settings.balanced and rule.by_class:
        counts = record.y[indices].bincount()
        budgets = class_budgets(counts, budget).tolist()
        parts = shards.map(select_classes, scorer, settings, budgets, seed)
    else:
        views = shards.map(view_shard, scorer, target_of(settings))
        parts = [_from_views(views, settings, budget, seed)]
    # a coreset of free size stands for all samples by its weights only
    return _joined(parts, weighted=settings.weighted or rule.sizes_itself)


def select_classes(shard: Shard, scorer: Scorer, settings: Select, budgets: list[int], seed: int) -> Selection:
    """Select from each class of a shard by itself: one forward pass, then the rule on the class's HeadView."""
    rule = coreset[settings.rule]
    memory = memory_bound(settings.memory)
    choose = partial(
        select_class,
        rule=rule,
        seed=seed,
        options=settings.options,
        memory=memory,
    )
    # Whole before the first class: what is kept of each would lie between the views of two, where a third has no room.
    members = torch.empty_like(shard.indices)
    scores = torch.empty(len(shard.indices))
    picks = []
    done = 0
    with Cost("select") as cost:
        classes = _viewed(shard, scorer, cost, target_of(settings))
        for part, picked in select_each(classes, budgets, choose):
            end = done + len(part.members)
            members[done:end] = part.members
            scores[done:end] = part.samples.norms()
            picks.append(picked)
            done = end
    return Selection(coreset=Coreset.concat(picks), indices=members, scores=scores, cost=cost)


def _viewed(shard: Shard, scorer: Scorer, cost: Cost, target: TargetSamples | None) -> Iterator[ClassSamples[HeadView]]:
    """Yield a shard's classes, each after a forward pass of its own, so that its views are never all in memory."""
    of_target = target.reached_by(shard) if target else None
    for label in shard.data.train.y[shard.indices].unique().tolist():
        members = _of_class(shard, label)
        view = scorer.view(shard, members)
        cost.forward += len(members)
        aimed_at = None
        if target and of_target:
            same = _of_class(of_target, label)
            if target.required and not len(same):
                raise target.missing(shard.data.train.classes[label])
            aimed_at = _view_of_some(of_target, same, scorer, cost)
        yield ClassSamples(label, members, view, aimed_at)


def _of_class(shard: Shard, label: int) -> Tensor:
    return shard.indices[shard.data.train.y[shard.indices] == label]


def _view_of_some(shard: Shard, indices: Tensor, scorer: Scorer, cost: Cost) -> HeadView | None:
    """Return the HeadView of the indices, if there are any."""
    if not len(indices):
        return None
    cost.forward += len(indices)
    return scorer.view(shard, indices)


class ShardView(NamedTuple):
    """What a model makes of a shard, for a selection over all classes at once."""

    indices: Tensor
    view: HeadView
    target: HeadView | None
    cost: Cost


def view_shard(shard: Shard, scorer: Scorer, target: TargetSamples | None) -> ShardView:
    """Return a shard's indices, HeadView, the HeadView of its share of the target, and its bill."""
    with Cost("select") as cost:
        view = scorer.view(shard, shard.indices)
        cost.forward += len(shard.indices)
        aimed_at = None
        if target:
            share = target.share_of(shard)
            aimed_at = _view_of_some(share, share.indices, scorer, cost)
    return ShardView(shard.indices, view, aimed_at, cost)


def _from_record(
    record: Record, indices: Tensor, settings: Select, budget: int, seed: int, progress: float
) -> Selection:
    with Cost("select") as cost:
        picked = select(
            record[indices],
            budget,
            settings.rule,
            seed=seed,
            options=settings.options,
            balanced=settings.balanced,
            progress=progress,
        )
    return Selection(picked.at(indices), indices, None, cost)


def _from_views(shards: Sequence[ShardView], settings: Select, budget: int, seed: int) -> Selection:
    indices = torch.cat([shard.indices for shard in shards])
    order = indices.argsort()  # the same order, hence the same picks, for any number of shards
    indices = indices[order]
    view = HeadView.concat([shard.view for shard in shards])[order]
    aimed_at = [shard.target for shard in shards if shard.target is not None]
    target = target_of(settings)
    if target and target.required and not aimed_at:
        raise target.missing()
    cost = Cost.joined("select", [shard.cost for shard in shards])
    with cost:
        picked = select_class(
            view,
            budget,
            coreset[settings.rule],
            seed=seed,
            label="all",
            options=settings.options,
            target=HeadView.concat(aimed_at) if aimed_at else None,
            memory=memory_bound(settings.memory),
        )
    return Selection(picked.at(indices), indices, view.norms(), cost)


def _joined(parts: Sequence[Selection], *, weighted: bool) -> Selection:
    """Join selections from disjoint samples, in the order of their positions."""
    picked = Coreset.concat([part.coreset for part in parts])
    ascending = picked.indices.argsort()
    chosen = picked.indices[ascending]
    weights = picked.weights[ascending]
    indices = torch.cat([part.indices for part in parts])
    order = indices.argsort()
    scores = [part.scores for part in parts if part.scores is not None]
    return Selection(
        coreset=Coreset(chosen, weights) if weighted else Coreset.uniform(chosen),
        indices=indices[order],
        scores=torch.cat(scores)[order] if scores else None,
        cost=Cost.joined("select", [part.cost for part in parts]),
    )

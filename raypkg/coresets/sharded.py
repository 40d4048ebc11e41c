"""Selection with a model's gradients over shards of the data, each holder working on its own classes.

Forward passes go class by class, so a class has the same batches, hence the same picks, on any holder.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from raypkg.core.settings import VALID, Model, Select
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.loop import autocast
from raypkg.engine.shards import Shard, Shards
from raypkg.engine.worker import CPU, Cost, memory_bound
from raypkg.models import build_model

from .budgets import budget_of, class_budgets, select, select_class
from .gradients import HeadView, gradient_norms, head_view
from .record import Record
from .rules import coreset
from .target import TargetSamples, target_of


@dataclass(frozen=True)
class Selection:
    """A coreset with the scores and the bill of its selection."""

    coreset: Coreset  # positions in the training split, ascending, with weights
    indices: Tensor  # all samples that took part, ascending, int64 [n]
    scores: Tensor | None  # their last-layer gradient norms, averaged over the models, float32 [n]; None without any
    cost: Cost  # over all holders


@dataclass(frozen=True)
class LiveModel:
    """A model of this process in its present state."""

    model: nn.Module
    precision: str

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def view(self, shard: Shard, indices: Tensor) -> HeadView:
        """Return the HeadView of the indices in one forward pass."""
        batches = plain_batches(shard.train, indices, shard.device, dtype=dtype_of(self.model))
        with autocast(self.precision, shard.device):
            return head_view(self.model, batches)

    def norms(self, shard: Shard, indices: Tensor) -> Tensor:
        """Return the norms of the full gradients of the indices, in the precision of the weights [n]."""
        batches = plain_batches(shard.train, indices, shard.device, dtype=dtype_of(self.model))
        return gradient_norms(self.model, batches)


@dataclass(frozen=True)
class SentModel:
    """A model as settings and arrays, which can be sent; it is built on first use."""

    settings: Model
    shape: tuple[int, ...]
    num_classes: int
    parameters: Mapping[str, np.ndarray]
    precision: str
    device: ClassVar[torch.device] = CPU  # where it is built

    @classmethod
    def of(cls, settings: Model, split: Split, state: Mapping[str, Tensor], precision: str) -> "SentModel":
        """Return the model of these settings and this state for the samples of a split."""
        parameters = {name: value.cpu().numpy() for name, value in state.items()}
        return cls(settings, split.shape, split.num_classes, parameters, precision)

    @cached_property
    def _built(self) -> nn.Module:
        chosen = self.settings
        model = build_model(chosen.name, self.shape, self.num_classes, seed=0, options=chosen.options)
        state = {name: torch.tensor(value) for name, value in self.parameters.items()}
        model.load_state_dict(state)  # all weights: the seed above does not matter
        return model

    def view(self, shard: Shard, indices: Tensor) -> HeadView:
        """Return the HeadView of the indices in one forward pass."""
        return self._on(shard).view(shard, indices)

    def norms(self, shard: Shard, indices: Tensor) -> Tensor:
        """Return the norms of the full gradients of the indices [n]."""
        return self._on(shard).norms(shard, indices)

    def _on(self, shard: Shard) -> LiveModel:
        model = self._built.to(shard.device).to(memory_format=torch.channels_last)
        return LiveModel(model, self.precision)


Scorer = LiveModel | SentModel  # a model whose gradients select
Scorers = Sequence[Scorer]  # several for a rule that averages over models
# A shard seen by the scorers, for a selection over all classes at once: its indices, each model's view of them, the
# first model's view of its share of the target, and the cost.
ShardView = tuple[Tensor, list[HeadView], HeadView | None, Cost]


def select_coreset(
    shards: Shards,
    scorers: Scorers,
    settings: Select,
    record: Record,
    indices: Tensor,
    *,
    seed: int,
    progress: float = 0.0,
) -> Selection:
    """Select a coreset of ``indices`` on the shards that hold them, or by the record for a rule that sees only that."""
    rule = coreset[settings.rule]
    budget = budget_of(settings.fraction, len(indices))
    if rule.sees == "record":
        with Cost("select") as cost:
            how: dict[str, Any] = {"options": settings.options, "balanced": settings.balanced, "progress": progress}
            picked = select(record[indices], budget, settings.rule, seed=seed, **how)
        parts = [Selection(picked.at(indices), indices, None, cost)]
    elif settings.balanced and rule.by_class:
        budgets = class_budgets(record.y[indices].bincount(), budget).tolist()
        parts = shards.map(select_classes, scorers, settings, budgets, seed)
    else:
        parts = [_select_from_all(shards, scorers, settings, budget, seed)]

    # Join the parts, which are of disjoint samples, in the order of positions.
    picked = Coreset.concat([part.coreset for part in parts])
    ascending = picked.indices.argsort()
    joined = Coreset(picked.indices[ascending], picked.weights[ascending])
    if not (settings.weighted or rule.sizes_itself):  # one of free size stands for all samples by its weights only
        joined = Coreset.uniform(joined.indices)
    took_part = torch.cat([part.indices for part in parts])
    order = took_part.argsort()
    scores = [part.scores for part in parts if part.scores is not None]
    cost = Cost.joined("select", [part.cost for part in parts])
    return Selection(joined, took_part[order], torch.cat(scores)[order] if scores else None, cost)


def select_classes(shard: Shard, scorers: Scorers, settings: Select, budgets: list[int], seed: int) -> Selection:
    """Select from each class of a shard by itself: one forward pass, then the rule on the class's HeadView."""
    rule = coreset[settings.rule]
    target = target_of(settings)
    reached = target.reached_by(shard) if target else None
    labels = shard.data.train.y[shard.indices]
    memory = memory_bound(settings.memory, shard.device)
    common: dict[str, Any] = {"seed": seed, "options": settings.options, "memory": memory, "device": shard.device}
    # Allocated before the first class: pieces between the views of two classes would leave no room for a third view.
    members = torch.empty_like(shard.indices)
    scores = torch.empty(len(shard.indices))
    picks = []
    done = 0
    with Cost("select") as cost:
        for label in labels.unique().tolist():
            part = shard.indices[labels == label]
            views = [scorer.view(shard, part) for scorer in scorers]
            cost.forward += len(part) * len(scorers)
            aim = None
            if target and reached:
                same = reached.indices[reached.data.train.y[reached.indices] == label]
                if target.required and not len(same):
                    raise target.missing(shard.data.train.classes[label])
                aim = _view_of_some(reached, same, scorers[0], cost)
            members[done : done + len(part)] = part
            scores[done : done + len(part)] = _mean(view.norms() for view in views)
            done += len(part)
            if budgets[label]:
                norms = partial(full_norms, shard, part, scorers, cost)
                of_models = {"others": views[1:], "full_norms": norms, **common}
                picked = select_class(views[0], budgets[label], rule, label=label, target=aim, **of_models)
                picks.append(picked.at(part))
    return Selection(Coreset.concat(picks), members, scores, cost)


def full_norms(shard: Shard, indices: Tensor, scorers: Scorers, cost: Cost) -> Tensor:
    """Return the norms of the samples' full gradients, averaged over the models [n]."""
    passes = len(indices) * len(scorers)
    cost.forward += passes
    cost.backward += passes
    return _mean(scorer.norms(shard, indices) for scorer in scorers)


def _mean(scores: Iterable[Tensor]) -> Tensor:
    return torch.stack([*scores]).mean(dim=0)


def _view_of_some(shard: Shard, indices: Tensor, scorer: Scorer, cost: Cost) -> HeadView | None:
    """Return the HeadView of the indices, if there are any."""
    if not len(indices):
        return None
    cost.forward += len(indices)
    return scorer.view(shard, indices)


def view_shard(shard: Shard, scorers: Scorers, target: TargetSamples | None) -> ShardView:
    """Compute the views of a shard and of its share of the target."""
    with Cost("select") as cost:
        views = [scorer.view(shard, shard.indices) for scorer in scorers]
        cost.forward += len(shard.indices) * len(scorers)
        aim = None
        if target:
            reached = target.reached_by(shard)
            share = reached.indices
            if target.name != VALID:  # every holder reaches all of a data set, and takes its share
                share = share.tensor_split(shard.world)[shard.rank]
            aim = _view_of_some(reached, share, scorers[0], cost)
    return shard.indices, views, aim, cost


def norms_of_shard(shard: Shard, scorers: Scorers) -> Tensor:
    """Return the norms of the full gradients of a shard's samples, averaged over the models [n]."""
    return _mean(scorer.norms(shard, shard.indices) for scorer in scorers)


def _select_from_all(shards: Shards, scorers: Scorers, settings: Select, budget: int, seed: int) -> Selection:
    """Select from all classes at once: their logits and features are gathered from the shards."""
    rule = coreset[settings.rule]
    target = target_of(settings)
    seen: list[ShardView] = shards.map(view_shard, scorers, target)
    parts, views, targets, costs = zip(*seen, strict=True)
    indices = torch.cat(parts)
    order = indices.argsort()  # the same order, hence the same picks, for any number of shards
    indices = indices[order]
    first, *others = [HeadView.concat(of_model)[order] for of_model in zip(*views, strict=True)]
    aims = [aim for aim in targets if aim is not None]

    def norms() -> Tensor:
        passes = len(indices) * len(scorers)
        cost.forward += passes
        cost.backward += passes
        return torch.cat(shards.map(norms_of_shard, scorers))[order]

    if target and target.required and not aims:
        raise target.missing()
    device = scorers[0].device
    memory = memory_bound(settings.memory, device)
    common: dict[str, Any] = {"seed": seed, "options": settings.options, "memory": memory, "device": device}
    cost = Cost.joined("select", costs)
    with cost:
        aim = HeadView.concat(aims) if aims else None
        picked = select_class(first, budget, rule, label="all", target=aim, others=others, full_norms=norms, **common)
    scores = _mean(view.norms() for view in (first, *others))
    return Selection(picked.at(indices), indices, scores, cost)

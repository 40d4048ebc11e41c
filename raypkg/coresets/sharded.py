"""Selection with a model's gradients over shards of the data, each holder working on its own classes.

Forward passes go class by class, so a class has the same batches, hence the same picks, on any holder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from raypkg.core.settings import VALID, Model, Select
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.costs import Cost
from raypkg.engine.loop import autocast
from raypkg.engine.shards import Shard, Shards
from raypkg.engine.worker import memory_bound
from raypkg.models import build_model

from .budgets import budget_of, class_budgets, select, select_class
from .gradients import HeadView, head_view
from .record import Record
from .rules import coreset
from .target import TargetSamples, target_of


@dataclass(frozen=True)
class Selection:
    """A coreset with the scores and the bill of its selection."""

    coreset: Coreset  # positions in the training split, ascending, with weights
    indices: Tensor  # all samples that took part, ascending, int64 [n]
    scores: Tensor | None  # their last-layer gradient norms, float32 [n]; None if no gradient was computed
    cost: Cost  # over all holders


@dataclass(frozen=True)
class LiveModel:
    """A model of this process in its present state."""

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
    """A model as settings and arrays, which can be sent; it is built on first use."""

    settings: Model
    shape: tuple[int, ...]
    num_classes: int
    parameters: Mapping[str, np.ndarray]
    precision: str

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
        model = self._built.to(shard.device).to(memory_format=torch.channels_last)
        return LiveModel(model, self.precision).view(shard, indices)


Scorer = LiveModel | SentModel  # the model whose gradients select
# A shard seen by a scorer, for a selection over all classes at once: its indices, the view of them and that of its
# share of the target, and the cost.
ShardView = tuple[Tensor, HeadView, HeadView | None, Cost]


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
    """Select a coreset of ``indices`` on the shards that hold them, or by the record for a rule that sees only that."""
    rule = coreset[settings.rule]
    budget = budget_of(settings.fraction, len(indices))
    if rule.sees == "record":
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
        parts = [Selection(picked.at(indices), indices, None, cost)]
    elif settings.balanced and rule.by_class:
        budgets = class_budgets(record.y[indices].bincount(), budget).tolist()
        parts = shards.map(select_classes, scorer, settings, budgets, seed)
    else:
        parts = [_from_views(shards.map(view_shard, scorer, target_of(settings)), settings, budget, seed)]

    # Join the parts, which are of disjoint samples, in the order of positions.
    picked = Coreset.concat([part.coreset for part in parts])
    ascending = picked.indices.argsort()
    joined = Coreset(picked.indices[ascending], picked.weights[ascending])
    # A coreset of free size stands for all samples by its weights only.
    if not (settings.weighted or rule.sizes_itself):
        joined = Coreset.uniform(joined.indices)
    took_part = torch.cat([part.indices for part in parts])
    order = took_part.argsort()
    scores = [part.scores for part in parts if part.scores is not None]
    return Selection(
        coreset=joined,
        indices=took_part[order],
        scores=torch.cat(scores)[order] if scores else None,
        cost=Cost.joined("select", [part.cost for part in parts]),
    )


def select_classes(shard: Shard, scorer: Scorer, settings: Select, budgets: list[int], seed: int) -> Selection:
    """Select from each class of a shard by itself: one forward pass, then the rule on the class's HeadView."""
    rule = coreset[settings.rule]
    target = target_of(settings)
    reached = target.reached_by(shard) if target else None
    labels = shard.data.train.y[shard.indices]
    memory = memory_bound(settings.memory)
    # Allocated before the first class: pieces between the views of two classes would leave no room for a third view.
    members = torch.empty_like(shard.indices)
    scores = torch.empty(len(shard.indices))
    picks = []
    done = 0
    with Cost("select") as cost:
        for label in labels.unique().tolist():
            part = shard.indices[labels == label]
            view = scorer.view(shard, part)
            cost.forward += len(part)
            aim = None
            if target and reached:
                same = reached.indices[reached.data.train.y[reached.indices] == label]
                if target.required and not len(same):
                    raise target.missing(shard.data.train.classes[label])
                aim = _view_of_some(reached, same, scorer, cost)
            members[done : done + len(part)] = part
            scores[done : done + len(part)] = view.norms()
            done += len(part)
            if budgets[label]:
                picked = select_class(
                    view,
                    budgets[label],
                    rule,
                    seed=seed,
                    label=label,
                    options=settings.options,
                    target=aim,
                    memory=memory,
                )
                picks.append(picked.at(part))
    return Selection(coreset=Coreset.concat(picks), indices=members, scores=scores, cost=cost)


def _view_of_some(shard: Shard, indices: Tensor, scorer: Scorer, cost: Cost) -> HeadView | None:
    """Return the HeadView of the indices, if there are any."""
    if not len(indices):
        return None
    cost.forward += len(indices)
    return scorer.view(shard, indices)


def view_shard(shard: Shard, scorer: Scorer, target: TargetSamples | None) -> ShardView:
    """Compute the views of a shard and of its share of the target."""
    with Cost("select") as cost:
        view = scorer.view(shard, shard.indices)
        cost.forward += len(shard.indices)
        aim = None
        if target:
            reached = target.reached_by(shard)
            share = reached.indices
            if target.name != VALID:  # every holder reaches all of a data set, and takes its share
                share = share.tensor_split(shard.world)[shard.rank]
            aim = _view_of_some(reached, share, scorer, cost)
    return shard.indices, view, aim, cost


def _from_views(shards: Sequence[ShardView], settings: Select, budget: int, seed: int) -> Selection:
    parts, views, targets, costs = zip(*shards, strict=True)
    indices = torch.cat(parts)
    order = indices.argsort()  # the same order, hence the same picks, for any number of shards
    indices = indices[order]
    view = HeadView.concat(views)[order]
    aims = [aim for aim in targets if aim is not None]
    target = target_of(settings)
    if target and target.required and not aims:
        raise target.missing()
    cost = Cost.joined("select", costs)
    with cost:
        picked = select_class(
            view,
            budget,
            coreset[settings.rule],
            seed=seed,
            label="all",
            options=settings.options,
            target=HeadView.concat(aims) if aims else None,
            memory=memory_bound(settings.memory),
        )
    return Selection(picked.at(indices), indices, view.norms(), cost)

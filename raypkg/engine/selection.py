"""Selecting a coreset with a model's gradients, each holder working on the classes it holds.

Forward passes go class by class, so a class meets the same batches, hence the same picks, wherever it is held.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raypkg.core.settings import Model, Select
from raypkg.methods.coreset import Coreset
from raypkg.methods.coresets import coreset
from raypkg.methods.gradients import HeadView, head_view
from raypkg.methods.selection import budget_of, class_budgets, select_class
from raypkg.models import build_model

from .batches import plain_batches
from .costs import Cost
from .loop import autocast
from .shards import Shard, Shards


@dataclass(frozen=True)
class Selection:
    """A coreset with what it was picked by.

    Attributes:
        coreset: positions in the training split, ascending, with weights.
        indices: all samples that took part, ascending, int64 [n].
        scores: their last-layer gradient norms, float32 [n].
        cost: the bill over all holders.
    """

    coreset: Coreset
    indices: Tensor
    scores: Tensor
    cost: Cost


@dataclass(frozen=True)
class Scorer:
    """The model whose gradients select, in a form that travels: settings and parameters as arrays."""

    model: Model
    parameters: Mapping[str, np.ndarray]
    precision: str
    seed: int

    def view(self, shard: Shard, indices: Tensor) -> HeadView:
        """Return the HeadView of the indices in one forward pass."""
        split = shard.data.train
        model = build_model(self.model.name, split.shape, split.num_classes, seed=self.seed, options=self.model.options)
        model.load_state_dict({name: torch.tensor(value) for name, value in self.parameters.items()})
        model.to(shard.device).to(memory_format=torch.channels_last)
        with autocast(self.precision, shard.device):
            return head_view(model, plain_batches(split, indices, 512, shard.device))


def select_coreset(
    shards: Shards, scorer: Scorer, settings: Select, y: Tensor, indices: Tensor, *, seed: int
) -> Selection:
    """Select a coreset of ``indices`` on the shards that hold them.

    Args:
        shards: hold the indices, whole classes each.
        scorer: the model to take gradients of.
        settings: method, fraction, balance, weights and the method's options.
        y: labels of the training split.
        indices: the samples to select from, int64 [n].
        seed: names every draw.

    Raises:
        UserError: unknown method, bad options, or gradients that are not finite.
    """
    entry = coreset[settings.method]
    entry.options(settings.options)  # refuse bad options before any forward pass
    budget = budget_of(settings.fraction, len(indices))
    if settings.balanced:
        counts = torch.bincount(y[indices])
        budgets = {int(label): int(class_budgets(counts, budget)[label]) for label in counts.nonzero()}
        parts = shards.map(select_classes, scorer, settings, budgets, seed)
    else:
        parts = [_from_views(shards.map(view_shard, scorer), settings, budget, seed)]
    picked = Coreset.concat([part.coreset for part in parts])
    if not settings.weighted:
        picked = Coreset.uniform(picked.indices)
    everyone, scores = torch.cat([part.indices for part in parts]), torch.cat([part.scores for part in parts])
    cost = Cost.joined("select", [part.cost for part in parts])
    return Selection(_sorted(picked), everyone.sort().values, scores[everyone.argsort()], cost)


def select_classes(shard: Shard, scorer: Scorer, settings: Select, budgets: dict[int, int], seed: int) -> Selection:
    """Select from each class of a shard by itself: one forward pass, then the method on the class's HeadView."""
    y, entry, cost = shard.data.train.y, coreset[settings.method], Cost("select")
    picks, scores, seen = [], [], []
    with cost:
        for label in y[shard.indices].unique().tolist():
            members, held_out = shard.indices[y[shard.indices] == label], shard.valid[y[shard.valid] == label]
            view = scorer.view(shard, members)
            valid = scorer.view(shard, held_out) if "valid" in entry.declares and len(held_out) else None
            cost.forward += len(members) + (len(held_out) if valid else 0)
            seen.append(members)
            scores.append(view.norms())
            if budgets[label]:
                picks.append(
                    select_class(
                        view, budgets[label], entry, seed=seed, label=label, options=settings.options, valid=valid
                    ).at(members)
                )
    return Selection(Coreset.concat(picks), torch.cat(seen), torch.cat(scores), cost)


def view_shard(shard: Shard, scorer: Scorer) -> tuple[Tensor, HeadView, HeadView | None, Cost]:
    """Return a shard's indices, HeadView, validation HeadView and bill, for selection over all classes at once."""
    with Cost("select") as cost:
        view = scorer.view(shard, shard.indices)
        valid = scorer.view(shard, shard.valid) if len(shard.valid) else None
    cost.forward += len(shard.indices) + len(shard.valid)
    return shard.indices, view, valid, cost


def _from_views(parts: list[Any], settings: Select, budget: int, seed: int) -> Selection:
    indices = torch.cat([part[0] for part in parts])
    order = indices.argsort()  # the same order, hence the same picks, for any number of shards
    view = _joined([part[1] for part in parts])[order]
    valid = [part[2] for part in parts if part[2] is not None]
    cost = Cost.joined("select", [part[3] for part in parts])
    with cost:
        picked = select_class(
            view,
            budget,
            coreset[settings.method],
            seed=seed,
            label="all",
            options=settings.options,
            valid=_joined(valid) if valid else None,
        )
    return Selection(picked.at(indices[order]), indices[order], view.norms(), cost)


def _joined(views: list[HeadView]) -> HeadView:
    return HeadView(*(torch.cat([getattr(view, name) for view in views]) for name in ("logits", "features", "y")))


def _sorted(picked: Coreset) -> Coreset:
    order = picked.indices.argsort()
    return Coreset(picked.indices[order], picked.weights[order])

"""Selecting a coreset with a model's gradients, each holder working on the classes it holds.

Forward passes go class by class, so a class meets the same batches, hence the same picks, wherever it is held.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from raypkg.core.settings import Model, Select
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.costs import Cost
from raypkg.engine.loop import autocast
from raypkg.engine.shards import Shard, Shards
from raypkg.engine.worker import memory_bound
from raypkg.models import build_model

from .budgets import budget_of, class_budgets, select, select_class
from .gradients import HeadView, head_view
from .record import Record
from .rules import coreset, needs_gradients, sizes_itself


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
        with autocast(self.precision, shard.device):
            batches = plain_batches(shard.data.train, indices, shard.device, dtype=dtype_of(self.model))
            return head_view(self.model, batches)


@dataclass(frozen=True)
class SentModel:
    """A model in a form that travels: settings and parameters as arrays, built where it arrives."""

    settings: Model
    shape: tuple[int, ...]
    num_classes: int
    parameters: Mapping[str, np.ndarray]
    precision: str

    @cached_property
    def _built(self) -> nn.Module:
        model = build_model(
            self.settings.name, self.shape, self.num_classes, seed=0, options=self.settings.options
        )  # every weight is then overwritten
        model.load_state_dict({name: torch.tensor(value) for name, value in self.parameters.items()})
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
        settings: method, fraction, balance, weights and the method's options.
        record: labels of the training split, and what training has seen of it.
        indices: the samples to select from, int64 [n].
        seed: names every draw.
        progress: share of the training that is done.

    Raises:
        UserError: unknown method, bad options, or gradients that are not finite.
    """
    entry, budget = coreset[settings.method], budget_of(settings.fraction, len(indices))
    if not needs_gradients(entry):
        parts = [_from_record(record, indices, settings, budget, seed, progress)]
    elif settings.balanced and not sizes_itself(entry):
        budgets = class_budgets(torch.bincount(record.y[indices]), budget).tolist()
        parts = shards.map(select_classes, scorer, settings, budgets, seed)
    else:
        parts = [_from_views(shards.map(view_shard, scorer), settings, budget, seed)]
    picked = _sorted(Coreset.concat([part.coreset for part in parts]))
    weighted = settings.weighted or sizes_itself(entry)  # a coreset of free size is unbiased by its weights only
    indices, order = torch.cat([part.indices for part in parts]).sort()
    scores = [part.scores for part in parts if part.scores is not None]
    return Selection(
        picked if weighted else Coreset.uniform(picked.indices),
        indices,
        torch.cat(scores)[order] if scores else None,
        Cost.joined("select", [part.cost for part in parts]),
    )


def select_classes(shard: Shard, scorer: Scorer, settings: Select, budgets: list[int], seed: int) -> Selection:
    """Select from each class of a shard by itself: one forward pass, then the method on the class's HeadView."""
    y, entry, cost = shard.data.train.y, coreset[settings.method], Cost("select")
    picks, scores, seen, memory = [], [], [], memory_bound(settings.memory)
    with cost:
        for label in y[shard.indices].unique().tolist():
            members, held_out = shard.indices[y[shard.indices] == label], shard.valid[y[shard.valid] == label]
            view = scorer.view(shard, members)
            valid = scorer.view(shard, held_out) if "valid" in entry.declares and len(held_out) else None
            cost.forward += len(members) + (len(held_out) if valid else 0)
            seen.append(members)
            scores.append(view.norms())
            if budgets[label]:
                given: dict[str, Any] = {"options": settings.options, "valid": valid, "memory": memory}
                picks.append(select_class(view, budgets[label], entry, seed=seed, label=label, **given).at(members))
    return Selection(Coreset.concat(picks), torch.cat(seen), torch.cat(scores), cost)


def view_shard(shard: Shard, scorer: Scorer) -> tuple[Tensor, HeadView, HeadView | None, Cost]:
    """Return a shard's indices, HeadView, validation HeadView and bill, for selection over all classes at once."""
    with Cost("select") as cost:
        view = scorer.view(shard, shard.indices)
        valid = scorer.view(shard, shard.valid) if len(shard.valid) else None
    cost.forward += len(shard.indices) + len(shard.valid)
    return shard.indices, view, valid, cost


def _from_record(
    record: Record, indices: Tensor, settings: Select, budget: int, seed: int, progress: float
) -> Selection:
    with Cost("select") as cost:
        picked = select(
            record[indices],
            budget,
            settings.method,
            seed=seed,
            options=settings.options,
            balanced=settings.balanced,
            progress=progress,
        )
    return Selection(picked.at(indices), indices, None, cost)


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
            memory=memory_bound(settings.memory),
        )
    return Selection(picked.at(indices[order]), indices[order], view.norms(), cost)


def _joined(views: list[HeadView]) -> HeadView:
    return HeadView(*(torch.cat([getattr(view, name) for view in views]) for name in ("logits", "features", "y")))


def _sorted(picked: Coreset) -> Coreset:
    order = picked.indices.argsort()
    return Coreset(picked.indices[order], picked.weights[order])

"""Selection with a model's gradients over shards of the data, each holder working on its own classes.

Forward passes go class by class, so a class has the same batches, hence the same picks, on any holder. A selection is
for the samples it selects from, for held-out ones, or for the training split of another data set: its target, seen as
they are by the last layer, or, of a language model, by rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.settings import TRAIN, VALID, Model, Select
from raypkg.data import Data, load_data
from raypkg.data.coreset import Coreset
from raypkg.data.kinds import TEXTS
from raypkg.data.split import Split, aligned
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.loop import autocast
from raypkg.engine.shards import Shard, Shards
from raypkg.engine.worker import CPU, Cost, memory_bound
from raypkg.models import build_model

from .budgets import budget_of, class_budgets, select, select_class
from .gradients import HeadView, gradient_norms, head_view
from .record import Record
from .rules import coreset


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

    def on(self, shard: Shard) -> "LiveModel":
        """Return the model itself: it is where it computes."""
        return self

    def view(self, shard: Shard, indices: Tensor) -> HeadView:
        """Return the HeadView of the indices in one forward pass."""
        batches = plain_batches(shard.train, indices, shard.device, dtype=dtype_of(self.model))
        with autocast(self.precision, shard.device):
            return head_view(self.model, batches)

    def norms(self, shard: Shard, indices: Tensor) -> Tensor:
        """Return the norms of the full gradients of the indices, in the precision of the weights [n]."""
        return gradient_norms(self.model, plain_batches(shard.train, indices, shard.device, dtype=dtype_of(self.model)))


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

    def on(self, shard: Shard) -> LiveModel:
        """Return the model on the device of a shard."""
        return LiveModel(self._built.to(shard.device).to(memory_format=torch.channels_last), self.precision)


Scorers = Sequence[LiveModel | SentModel]  # models whose gradients select; several for a rule that averages over them


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
    models = [scorer.on(shard) for scorer in scorers]
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
            views = [model.view(shard, part) for model in models]
            passes = len(part) * len(models)
            cost.forward += passes
            aim = None
            if target and reached:
                same = reached.indices[reached.data.train.y[reached.indices] == label]
                if len(same):
                    aim = models[0].view(reached, same)
                    cost.forward += len(same)
                elif target.required:
                    raise target.missing(shard.data.train.classes[label])
            members[done : done + len(part)] = part
            scores[done : done + len(part)] = _mean(view.norms() for view in views)
            done += len(part)
            if budgets[label]:

                def norms(part: Tensor = part, passes: int = passes) -> Tensor:
                    cost.forward += passes
                    cost.backward += passes
                    return _mean(model.norms(shard, part) for model in models)

                of_models = {"others": views[1:], "full_norms": norms, **common}
                picked = select_class(views[0], budgets[label], rule, label=label, target=aim, **of_models)
                picks.append(picked.at(part))
    return Selection(Coreset.concat(picks), members, scores, cost)


def _mean(scores: Iterable[Tensor]) -> Tensor:
    return torch.stack([*scores]).mean(dim=0)


def view_shard(
    shard: Shard, scorers: Scorers, target: "TargetSamples | None"
) -> tuple[Tensor, list[HeadView], list[HeadView], Cost]:
    """Return a shard's indices, each model's view of them, the first one's of its share of the target, and the cost."""
    models = [scorer.on(shard) for scorer in scorers]
    with Cost("select") as cost:
        views = [model.view(shard, shard.indices) for model in models]
        cost.forward += len(shard.indices) * len(models)
        aims = []
        if target:
            reached = target.reached_by(shard)
            share = reached.indices
            if target.name != VALID:  # every holder reaches all of a data set, and takes its share
                share = share.tensor_split(shard.world)[shard.rank]
            if len(share):
                aims.append(models[0].view(reached, share))
                cost.forward += len(share)
    return shard.indices, views, aims, cost


def norms_of_shard(shard: Shard, scorers: Scorers) -> Tensor:
    """Return the norms of the full gradients of a shard's samples, averaged over the models [n]."""
    return _mean(scorer.on(shard).norms(shard, shard.indices) for scorer in scorers)


def _select_from_all(shards: Shards, scorers: Scorers, settings: Select, budget: int, seed: int) -> Selection:
    """Select from all classes at once: their logits and features are gathered from the shards."""
    target = target_of(settings)
    parts, views, targets, costs = zip(*shards.map(view_shard, scorers, target), strict=True)
    indices = torch.cat(parts)
    order = indices.argsort()  # the same order, hence the same picks, for any number of shards
    indices = indices[order]
    first, *others = [HeadView.concat(of_model)[order] for of_model in zip(*views, strict=True)]
    aims = [aim for of_shard in targets for aim in of_shard]
    if target and target.required and not aims:
        raise target.missing()
    cost = Cost.joined("select", costs)

    def norms() -> Tensor:
        passes = len(indices) * len(scorers)
        cost.forward += passes
        cost.backward += passes
        return torch.cat(shards.map(norms_of_shard, scorers))[order]

    device = scorers[0].device
    memory = memory_bound(settings.memory, device)
    common: dict[str, Any] = {"seed": seed, "options": settings.options, "memory": memory, "device": device}
    with cost:
        aim = HeadView.concat(aims) if aims else None
        of_models = {"others": others, "full_norms": norms, **common}
        picked = select_class(first, budget, coreset[settings.rule], label="all", target=aim, **of_models)
    scores = _mean(view.norms() for view in (first, *others))
    return Selection(picked.at(indices), indices, scores, cost)


@dataclass(frozen=True)
class TargetSamples:
    """Samples to select for that are not those to select from; opened on first use, so cheap to send."""

    name: str  # "valid", or of a data set
    options: Mapping[str, Any]  # of the data set
    required: bool  # given by the user; otherwise a class without any is its own target
    own_classes: bool = False  # may have other classes than the samples to select from: subtasks of a language model

    def reached_by(self, shard: Shard) -> Shard:
        """Return the samples that a holder reaches: the held-out ones of its classes, or a whole data set."""
        nothing = shard.indices[:0]
        if self.name == VALID:
            return Shard(Data(shard.train, shard.data.test), shard.valid, nothing, shard.device)
        split = self.split_like(shard.data.train)
        return Shard(Data(split, split), torch.arange(len(split)), nothing, shard.device)

    def split_like(self, train: Split) -> Split:
        """Return the data set with the normalisation of the samples to select from and, if it must, their classes."""
        if train.kind is TEXTS and not self.options.get("tokenizer"):  # it would train one on texts of its own
            raise UserError(f"{self}: its texts must be cut as those of training are: give option tokenizer for both")
        return aligned(self._opened, train, str(self), classes=not self.own_classes)

    def check(self, train: Split, held_out: Tensor | None = None) -> None:
        """Refuse, before any work, samples that are missing or do not suit the training split."""
        if self.name != VALID:
            self.split_like(train)
        elif self.required and held_out is not None and not len(held_out):
            raise self.missing()

    def missing(self, label: str | None = None) -> UserError:
        """Return the error that there are no such samples, at all or of a class."""
        if label is None:
            return UserError(f"{self}: no samples are held out, as dataset.validation = 0 says")
        if self.name == VALID:
            return UserError(f"{self}: no sample of class {label!r} is held out, see dataset.validation")
        return UserError(f"{self} has no sample of class {label!r}: add some, or give select.balanced = false")

    def __str__(self) -> str:
        return f"select.target = {self.name}"

    @cached_property
    def _opened(self) -> Split:
        return load_data(self.name, self.options).train


def target_of(settings: Select) -> TargetSamples | None:
    """Return the samples that a selection is for; None = those to select from."""
    chosen = settings.target
    if chosen is None:
        by_default = "valid" in coreset[settings.rule].declares
        return TargetSamples(VALID, {}, required=False) if by_default else None
    if chosen.name == TRAIN:
        return None
    own_classes = coreset[settings.rule].sees == "rows"
    return TargetSamples(chosen.name, chosen.options, required=True, own_classes=own_classes)

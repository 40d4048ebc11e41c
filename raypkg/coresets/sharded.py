"""Selection with a model's gradients over shards of the data, once or while training goes on; checks before any work.

Each holder works on its own classes. Forward passes go class by class, so a class has the same batches, hence the same
picks, on any holder. A selection is for the samples it selects from, for held-out ones, or for the training split of
another data set: its target, seen as they are by the last layer, or, of a language model, by rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import derive
from raypkg.core.settings import TRAIN, VALID, Model, Reselect, Select
from raypkg.data import Data, load_data
from raypkg.data.coreset import Coreset
from raypkg.data.kinds import TEXTS
from raypkg.data.split import Split, aligned
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.loop import autocast
from raypkg.engine.run import Hook, Results, Run, Selected
from raypkg.engine.shards import Shard, Shards
from raypkg.engine.worker import CPU, Cost, memory_bound
from raypkg.models import build_model

from .budgets import budget_of, class_budgets, select, select_class
from .gradients import HeadView, gradient_norms, head_view
from .record import Record, Recorder
from .rules import Rule, coreset


def check_schedule(settings: Reselect, epochs: int, *, given: bool = False, has_rows: bool = False) -> None:
    """Refuse, before any work, a selection that cannot be done in a training of so many epochs.

    With a ``given`` first coreset and no later selection, only the epochs are checked. ``has_rows``: the selection has
    rows of a language model, and nothing else of it.
    """
    if settings.warm_epochs >= epochs:
        raise UserError(f"select.warm_epochs = {settings.warm_epochs} of {epochs} epochs: nothing would be selected")
    left = epochs - settings.warm_epochs
    if settings.every_epochs > left:
        raise UserError(f"select.every_epochs = {settings.every_epochs}: only {left} epochs follow the warm ones")
    if given and not settings.every_epochs:
        return
    rule = coreset[settings.rule]
    rule.options(settings.options)
    _check_idle(settings, has_rows)
    anew_from_all = settings.fraction == 1 and settings.every_epochs == 1
    if rule.sizes_itself and not anew_from_all:
        raise UserError(
            f"{settings.rule} keeps as many samples as it sees fit, anew at every epoch: it needs select.fraction = 1"
            f" and select.every_epochs = 1, not {settings.fraction:g} and {settings.every_epochs}"
        )
    if not rule.sizes_itself and settings.fraction == 1:
        raise UserError(f"{settings.rule} with select.fraction = 1 would keep every sample: give a smaller one")


def check_selects_once(select: Select, *, has_rows: bool = False) -> None:
    """Refuse, before any work, a rule that acts only during training, and settings that would do nothing."""
    _check_idle(select, has_rows)
    if coreset[select.rule].sizes_itself:
        raise UserError(f"{select.rule} acts at every epoch of a training: see `effray train --help`")


def _check_idle(settings: Select, has_rows: bool = False) -> None:
    """Refuse a rule that goes by other things, and a bound of memory, a target, or its options that do nothing."""
    rule, chosen = coreset[settings.rule], settings.target
    if rule.sees == "rows" and not has_rows:
        raise UserError(f"{rule.name} selects by rows of a language model: only effray instruct computes them")
    if rule.sees == "gradients" and has_rows:
        able = ", ".join(name for name in coreset.names if coreset[name].sees == "rows")
        raise UserError(f"{rule.name} selects by the gradients of a classifier's head: give {able} or random")
    if settings.memory is not None and "memory" not in rule.declares:
        raise UserError(f"{rule.name} caches nothing: select.memory = {settings.memory:g} would do nothing")
    if chosen is None:
        return
    if chosen.options and not chosen.is_data_set:
        raise UserError(f"select.target = {chosen.name} takes no options: {min(chosen.options)} would do nothing")
    if chosen.name != TRAIN and not rule.has_target:
        raise idle_target(rule, f"select.target = {chosen.name}")


def idle_target(rule: Rule, given: str) -> UserError:
    """Return the error that a target, as it was given, would do nothing."""
    able = [name for name in coreset.names if coreset[name].has_target]
    return UserError(f"{rule.name} selects for no target: {given} would do nothing; {', '.join(able)} select for one")


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

    def on(self, shard: Shard) -> LiveModel:
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
    def of(cls, settings: Model, split: Split, state: Mapping[str, Tensor], precision: str) -> SentModel:
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
        parts = shards.map(select_classes, scorers, settings, budgets, seed, progress)
    else:
        parts = [_select_from_all(shards, scorers, settings, budget, seed, progress)]

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


def select_classes(
    shard: Shard, scorers: Scorers, settings: Select, budgets: list[int], seed: int, progress: float
) -> Selection:
    """Select from each class of a shard by itself: one forward pass, then the rule on the class's HeadView."""
    rule = coreset[settings.rule]
    models = [scorer.on(shard) for scorer in scorers]
    target = target_of(settings)
    reached = target.reached_by(shard) if target else None
    labels = shard.data.train.y[shard.indices]
    common: dict[str, Any] = {"seed": seed, "options": settings.options, "progress": progress}
    common |= {"memory": memory_bound(settings.memory, shard.device), "device": shard.device}
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
    shard: Shard, scorers: Scorers, target: TargetSamples | None
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


def _select_from_all(
    shards: Shards, scorers: Scorers, settings: Select, budget: int, seed: int, progress: float
) -> Selection:
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
    common: dict[str, Any] = {"seed": seed, "options": settings.options, "progress": progress}
    common |= {"memory": memory_bound(settings.memory, device), "device": device}
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


class Reselection(Hook):
    """Trains on all samples for ``warm_epochs``, then selects a coreset, and a new one after every ``every_epochs``.

    Each selection uses the model and the record of that moment, on all workers together.
    """

    priority = 0

    def __init__(
        self, settings: Reselect, shards: Shards, recorder: Recorder, indices: Tensor, first: Coreset | None = None
    ):
        self.settings = settings
        self.shards = shards
        self.recorder = recorder
        self.indices = indices
        self.first = first
        self.selects = first is None or settings.every_epochs > 0
        self.scores: Tensor | None = None  # gradient norms of the indices at the latest selection [n]

    def on_start(self, run: Run) -> None:
        """Refuse a target that does not suit the samples."""
        target = target_of(self.settings)
        if self.selects and target:
            target.check(run.split)

    def on_epoch(self, run: Run) -> None:
        """Select if it is due."""
        if run.epoch < self.settings.warm_epochs:
            run.coreset = Coreset.uniform(self.indices)
        elif run.epoch == self.settings.warm_epochs and self.first is not None:
            run.coreset = self.first
        elif self.settings.due(run.epoch):
            with run.bill("select") as cost, torch.no_grad():
                run.worker.share(run.model.buffers())
                models = [LiveModel(run.model, run.settings.precision)]
                record = self.recorder.record
                seed = derive(run.seed, "selection", run.epoch)
                done = run.epoch / run.settings.epochs
                selection = select_coreset(
                    self.shards, models, self.settings, record, self.indices, seed=seed, progress=done
                )
            if run.worker.rank == 0:
                cost.forward += selection.cost.forward
                cost.backward += selection.cost.backward
            self.scores = selection.scores
            run.coreset = selection.coreset

    def results(self, run: Run) -> Results:
        """Return the coreset in use and the scores of the latest selection, if training selected one by itself."""
        if not self.selects:
            return Results()
        origin = {"epochs": run.settings.epochs, **self.settings.model_dump()}
        return Results(selected=Selected(run.coreset, origin, self.indices, self.scores))

    def state_dict(self) -> dict[str, Any]:
        """Return the scores; the coreset is the run's own."""
        return {"scores": self.scores}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the scores."""
        self.scores = state["scores"]

"""Selection during training: checks before any work, and the hook that selects a new coreset when one is due."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.seeds import derive
from raypkg.core.settings import TRAIN, Reselect, Select
from raypkg.data.coreset import Coreset
from raypkg.engine.run import Hook, Results, Run, Selected
from raypkg.engine.shards import Shards

from .record import Recorder
from .rules import Rule, coreset
from .sharded import LiveModel, select_coreset, target_of


def check_schedule(settings: Reselect, epochs: int, *, given: bool = False, has_rows: bool = False) -> None:
    """Refuse, before any work, a selection that cannot be done in a training of so many epochs.

    With a ``given`` first coreset and no later selection, only the epochs are checked. ``has_rows``: see below.
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
    """Refuse, before any work, a rule that acts only during training, and settings that would do nothing.

    ``has_rows``: the selection has rows of a language model, and nothing else of it.
    """
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

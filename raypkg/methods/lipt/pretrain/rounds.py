"""From one round of LiPT's models to the next: the merge, and what is kept of it in case the run is stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from raypkg.engine.costs import Cost
from raypkg.methods.lipt.outer import outer_step
from raypkg.methods.lipt.soup import State

from .member import Context, Round, Trained, parameters_of
from .merging import merged_parameters

MERGED = "merged"  # names the checkpoints of what is merged


@dataclass(frozen=True)
class Merged:
    """The models after a merge, when all of them are equal, or before the first.

    Attributes:
        epoch: that all of them have done.
        parameters: of each of them.
        velocity: of the outer momentum; empty before the first merge, or without momentum.
        trained: seconds that the training of each model has taken so far, by its number.
        slowest: seconds of the slowest model, summed over the rounds.
        merging: the bill of the merges, over all workers.
    """

    parameters: State
    epoch: int = 0
    velocity: State = field(default_factory=dict)
    trained: Sequence[float] = ()
    slowest: float = 0.0
    merging: Cost = field(default_factory=lambda: Cost("merge"))

    def until(self, last: int) -> Round:
        """Return the round that ends after epoch ``last``."""
        return Round(self.epoch, last, self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as tensors and plain values."""
        return {**vars(self), "trained": list(self.trained), "merging": self.merging.record()}


def restored(context: Context) -> Merged:
    """Return how far the models were when the run was stopped, the same on every worker; at first, w0."""
    worker = context.worker
    # One reads for all: workers of an attempt that was lost may write another checkpoint while others read.
    state = worker.first(context.checkpoints(MERGED).load() if worker.rank == 0 else None)
    if state is None:
        return Merged(parameters_of(context.model()))
    return Merged(**{**state, "merging": Cost(**state["merging"])})


def merge_round(context: Context, stage: Round, before: Merged, trained: Sequence[Trained]) -> Merged:
    """Merge the models of all workers after a round.

    Args:
        context: of this worker.
        stage: the round.
        before: the models when it began.
        trained: the models of this worker.
    """
    worker = context.worker
    worker.sum(torch.zeros(1, device=worker.device))  # wait here, so that the merge's seconds are its own
    with Cost("merge") as merging:
        members = [each.member for each in trained]
        merged = merged_parameters(context, stage.start, members, merging)
        momentum = context.settings.pretrain.outer_momentum
        parameters, velocity = outer_step(stage.start, merged, before.velocity, momentum)
    seconds = of_all_models(context, [each.cost.seconds for each in trained])
    earlier = before.trained or [0.0] * len(seconds)
    return Merged(
        parameters=parameters,
        epoch=stage.last,
        velocity=velocity,
        trained=seconds,
        slowest=before.slowest + max(now - then for now, then in zip(seconds, earlier, strict=True)),
        merging=before.merging.then(merging.gathered(worker)),
    )


def keep_round(context: Context, merged: Merged) -> None:
    """Keep what the next round starts from; no worker begins that round before it is kept."""
    worker = context.worker
    if worker.rank == 0:
        context.checkpoints(MERGED).save(merged.epoch, merged.state_dict())
    worker.sum(torch.zeros(1, device=worker.device))


def of_all_models(context: Context, values: Sequence[Any]) -> list[Any]:
    """Return the values of the models of all workers, in the order of their numbers."""
    by_worker = context.worker.gather(list(values))  # worker r of W has those of r, r + W, …
    world = context.worker.world
    models = context.settings.pretrain.models
    return [by_worker[number % world][number // world] for number in range(models)]

"""Answers to requests: the recorded training is replayed with other samples, and becomes the record of the next.

`verify` measures an answer against retraining.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from raypkg.core.errors import UserError
from raypkg.core.settings import Cluster
from raypkg.data import Data
from raypkg.data.split import Split
from raypkg.engine.worker import threads
from raypkg.experiments.samples import new_model

from .history import History, HistoryWriter, check_room, history_folder
from .journal import Change, Entry, group_sizes
from .objective import Objective, assign
from .replay import ChangedStep, Periodic, replay, retrain
from .run import Membership, RecordedRun, joined
from .settings import ReplaySettings, RequestSettings

# Operations that take as long, in float64 on one core, as the calls of a whole replay, of one of its steps, and of a
# step of training: measured at 650 parameters, in batches of 100 and of 1,292.
START, REPLAYED, TRAINED = 7e7, 1.3e6, 5e5

if TYPE_CHECKING:
    from raypkg.engine.shards import Shard, Shards

FEW = 2048  # samples that are computed here faster than on actors
Follow = Callable[[Iterable[Any], int], Iterable[Any]]  # shows the progress of a number of steps


def answer(
    run: RecordedRun, change: Change, settings: RequestSettings, follow: Follow = lambda steps, total: steps
) -> Entry:
    """Replay the training with changed samples, make the result durable and return its entry in the journal.

    A failure before `Journal.commit`, such as a full disk, a corrupt record or a replay that diverges, changes nothing.
    """
    started = time.perf_counter()
    history = run.history()
    total = len(history)

    everyone, membership, before = changed_members(run, change)
    chosen = settings.replay
    exact_steps = Periodic(chosen.period, *chosen.beginning(total))
    folder = history_folder(run.storage, len(run.journal.entries))
    check_room(folder, history.layout, total)
    exact = 0
    with (
        closing(HistoryWriter(folder, history.layout)) as writer,
        sharded_gradient(run.objective, everyone, settings.cluster) as gradient,
    ):
        writer.start()
        replayed = replay(
            changed_steps(history, membership, before, change.now),
            gradient,
            exact_steps,
            decay=run.settings.train.weight_decay,
            pairs=chosen.pairs,
            convex=run.objective.linear,
        )
        for step in follow(replayed, total):
            if not step.after.isfinite().all():
                raise UserError(
                    "the replay diverges: take more exact steps, by a smaller --period or a larger --burn-in, unless"
                    " training with these samples diverges itself"
                )
            writer.append(step.rate, step.w, step.gradient)
            exact += step.exact
        w = step.after
        sealed = writer.seal(w)

    facts = {
        "samples": int(change.now.sum()),
        "history": sealed,
        "steps": total,
        "exact": exact,
        "gradients": gradient.samples,
    }
    model = new_model(run.settings, run.samples.data).double()
    assign(model, w)
    entry = run.journal.commit(change, model.state_dict(), facts, started)
    run.apply(entry)
    return entry


def changed_members(run: RecordedRun, change: Change) -> tuple[Split, Membership, Tensor]:
    """Return all samples, their batches, and who was in use before, bool [ids].

    New samples get the next ids and a place in a batch of every epoch.
    """
    if not change.new:
        return run.split, run.membership, change.before
    everyone = joined(run.split, change.new)
    newcomers = torch.arange(len(run.split), len(everyone))
    groups = newcomers.split(group_sizes(change.requests, len(newcomers)))
    membership = replace(run.membership, added=(*run.membership.added, *groups))
    return everyone, membership, change.before.index_fill(0, newcomers, False)


def estimate(run: RecordedRun, change: Change, chosen: ReplaySettings) -> float:
    """Return the work of a replay over that of training again, both counted in gradients of samples.

    A replayed step costs 2m + 3 more: its product with B has 8mp operations, its sums of vectors some 12p, and a
    sample's gradient of a linear model 4p. Calls that are independent of p count as well: with small batches or few
    steps they take most of the time.
    """
    _, membership, before = changed_members(run, change)
    history = run.history()
    total = len(history)
    exact_steps = Periodic(chosen.period, *chosen.beginning(total))
    of_gradient = 4 * history.layout.parameters
    work, again = START / of_gradient, 0.0
    use = before.to(torch.uint8) + 2 * change.now.to(torch.uint8)  # 1 = goes, 2 = comes, 3 = stays
    differs = learnt = False
    for batch in membership.batches(total):
        _, gone, came, kept = use[batch].bincount(minlength=4).tolist()
        again += came + kept + TRAINED / of_gradient
        if not came + kept or not (differs or gone + came):
            continue
        work += gone + came + 2 * chosen.pairs + 3 + REPLAYED / of_gradient
        exact = differs and (not learnt or exact_steps.due())  # of the first changed step all is recorded
        work += kept if exact else 0
        exact_steps.took(exact)
        learnt |= exact
        differs = True
    return work / again


def changed_steps(history: History, membership: Membership, before: Tensor, now: Tensor) -> Iterator[ChangedStep]:
    """Yield the record with the change of every batch, for samples in use ``before`` and ``now``, bool [ids]."""
    records = map(history.read, range(len(history) + 1))
    for (record, following), batch in zip(pairwise(records), membership.batches(len(history)), strict=True):
        was = before[batch]
        stays = now[batch]
        kept, gone, came = batch[was & stays], batch[was & ~stays], batch[stays & ~was]
        yield ChangedStep(record.rate, record.w, record.gradient, following.w, kept, gone, came)


# Sums of gradients, in this process or on actors


@dataclass
class ShardedGradient:
    """Σ ∇loss_i(w): small sums in this process, others where samples are held, added in the order of the shards.

    Sums over at most ``few`` samples are small. Without shards, everything is computed in this process.
    """

    objective: Objective
    split: Split
    shards: Shards | None = None
    few: int = FEW
    samples: int = 0  # gradients computed so far

    def __call__(self, w: Tensor, indices: Tensor) -> Tensor:
        """Return the sum over the indices, float64 [p]."""
        self.samples += len(indices)
        if self.shards is None or len(indices) <= self.few:
            return self.objective.gradient_sum(self.split, w, indices)
        sums = self.shards.map(_sum_of_shard, self.objective, w, indices)
        return torch.stack(sums).sum(0)


@contextmanager
def sharded_gradient(objective: Objective, split: Split, cluster: Cluster) -> Iterator[ShardedGradient]:
    """Hold a split's samples in contiguous ranges, in this process or on actors, until the block ends.

    No actor is started for a split of few samples, as none would ever be used.
    """
    if cluster.workers == 0 or len(split) <= FEW:
        with threads(cluster.cpus_without_gpu):
            yield ShardedGradient(objective, split)
        return

    from raypkg.cluster.actors import hold
    from raypkg.engine.shards import Shard

    data = Data(split, split)

    def ranges(count: int) -> list[Shard]:
        everyone = torch.arange(len(split))
        return [Shard(data, indices, everyone[:0]) for indices in everyone.tensor_split(count)]

    with hold(ranges, cluster) as shards:
        yield ShardedGradient(objective, split, shards)


def _sum_of_shard(shard: Shard, objective: Objective, w: Any, indices: Any) -> Tensor:
    local = (indices >= shard.indices[0]) & (indices <= shard.indices[-1])
    return objective.gradient_sum(shard.data.train, w, indices[local])


# Comparison with retraining


def held_out(run: RecordedRun, on: str) -> tuple[float, float]:
    """Return loss and accuracy of the run's model on its samples held out for validation, or on the test samples."""
    split, positions = run.samples.data.train, run.samples.held_out
    if on == "test":
        split = run.samples.data.test
        positions = torch.arange(len(split))
    logits = run.objective.logits(split, run.weights(), positions)
    y = split.y[positions]
    return cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


class Verdict(NamedTuple):
    """The distance between a run's model and the retrained one."""

    distance: float  # ‖w − retrained w‖
    norm: float  # ‖retrained w‖
    disagreement: float  # share of the test samples that the two predict differently
    accuracy: float  # of the run's model on the test samples
    retrained_accuracy: float
    seconds: float  # of retraining
    samples: int  # gradients computed by retraining


def verify(run: RecordedRun, cluster: Cluster, follow: Follow = lambda steps, total: steps) -> Verdict:
    """Retrain with the samples in use, from the same weights in the same order, and compare."""
    history = run.history()
    membership = run.membership

    def steps() -> Iterator[tuple[float, Tensor]]:
        for record, batch in zip(history, membership.batches(len(history)), strict=True):
            yield record.rate, batch[run.active[batch]]

    start = time.perf_counter()
    with sharded_gradient(run.objective, run.split, cluster) as gradient:
        trained = retrain(steps(), history[0].w, gradient, decay=run.settings.train.weight_decay)
        *_, retrained = follow(trained, len(history))
    seconds = time.perf_counter() - start

    test = run.samples.data.test
    everyone = torch.arange(len(test))
    w = run.weights()
    predicted, expected = (run.objective.logits(test, weights, everyone).argmax(1) for weights in (w, retrained))
    return Verdict(
        distance=(w - retrained).norm().item(),
        norm=retrained.norm().item(),
        disagreement=(predicted != expected).double().mean().item(),
        accuracy=(predicted == test.y).double().mean().item(),
        retrained_accuracy=(expected == test.y).double().mean().item(),
        seconds=seconds,
        samples=gradient.samples,
    )

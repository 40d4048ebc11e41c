"""Answering requests by replaying a recorded training, and proving the answers by training again."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raypkg.cluster.actors import hold
from raypkg.core.settings import Cluster
from raypkg.data import Data
from raypkg.data.split import Split, joined
from raypkg.engine.schedules import learning_rate
from raypkg.engine.shards import Shard
from raypkg.phases.samples import new_model
from raypkg.phases.training import MODEL
from raypkg.runs.checkpoints import save_tensors

from .books import Books, Change
from .exactness import Periodic, Tolerant
from .history import History, Layout, Recording, check_room
from .ledger import digest
from .membership import Membership
from .objective import Objective, ShardedGradient
from .recording import layout, version
from .replay import GradientSum, Step, replay, retrain
from .vectors import assign

Follow = Callable[[Iterable[Any], int], Iterable[Any]]  # shows the progress of so many steps


class Counted:
    """A sum of gradients that counts the samples it was asked for.

    Args:
        gradient: Σ ∇loss_i(w).
    """

    def __init__(self, gradient: GradientSum):
        self.gradient, self.samples = gradient, 0

    def __call__(self, w: Tensor, indices: Tensor) -> Tensor:
        """Return Σ ∇loss_i(w), float64 [p]."""
        self.samples += len(indices)
        return self.gradient(w, indices)


class Verdict(NamedTuple):
    """How near the books' model is to the one that training without the deleted, with the added samples gives.

    Attributes:
        distance: ‖w − retrained w‖.
        norm: ‖retrained w‖.
        disagreement: share of the test samples that the two predict differently.
        accuracy: of the books' model on the test samples.
        retrained_accuracy: of the other.
        seconds: that retraining took.
        samples: gradients that retraining computed.
    """

    distance: float
    norm: float
    disagreement: float
    accuracy: float
    retrained_accuracy: float
    seconds: float
    samples: int


def answer(books: Books, change: Change, cluster: Cluster, follow: Follow) -> dict[str, Any]:
    """Replay the training with changed samples and enter what came of it; return the log's entry.

    Everything is written beside what holds, and holds once the log has its entry: a process that dies before has
    changed nothing, what one that dies after has left undone is done by the next that opens the books.

    Args:
        books: of the run.
        change: what is to be different.
        cluster: where gradients are computed.
        follow: shows progress.
    """
    start, number, settings = time.perf_counter(), books.last["number"] + 1, books.settings
    everyone = joined(books.split, change.new) if change.new else books.split
    history, (membership, now) = books.history(), _afterwards(books, change, len(everyone))
    folder = version(books.storage, number)
    check_room(folder, history.layout, len(history))
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that died
    sink = Recording(folder, layout(settings, books.found.data))
    w, exact = torch.empty(0), 0
    when, steps = _when(books, len(history)), changed_steps(history, membership, _padded(books.active, len(now)), now)
    with sink, gradients(books.objective, everyone, books.found.data, cluster) as gradient:
        sink.cut([])
        replayed = replay(
            steps,
            gradient,
            when,
            decay=settings.train.weight_decay,
            pairs=settings.replay.pairs,
            convex=books.objective.linear,
        )
        for step in follow(replayed, len(history)):
            sink.append(step.rate, step.w.numpy(), step.gradient.numpy())
            w, exact = step.after, exact + step.exact
        sealed = sink.seal(w.numpy())
    model = save_weights(books, f"versions/{folder.name}/{MODEL}", w)
    entry = {
        "kind": "change",
        "requests": list(change.requests),
        "deleted": len(change.gone),
        "restored": len(change.came),
        "new": len(change.new) if change.new else 0,
        "samples": int(now.sum()),
        **books.write_change(number, change),
        "model": model,
        "history": sealed,
        "steps": len(history),
        "exact": exact,
        "gradients": gradient.samples,
        "estimate": None if when.estimate is None else when.estimate + rounding(history.layout, w),
        "seconds": time.perf_counter() - start,
    }
    books.enter(entry)
    return books.last


def compare_with_retraining(books: Books, cluster: Cluster, follow: Follow) -> Verdict:
    """Train again with the samples that are in use, from the same weights in the same order, and compare."""
    history, membership, start = books.history(), books.membership, time.perf_counter()
    decay, data = books.settings.train.weight_decay, books.found.data
    with gradients(books.objective, books.split, data, cluster) as gradient:
        steps = (
            (history[step].rate, batch[books.active[batch]]) for step, batch in enumerate(places(history, membership))
        )
        initial = torch.from_numpy(history[0].w)
        *_, retrained = follow(retrain(steps, initial, gradient, decay=decay), len(history))
    seconds, w = time.perf_counter() - start, books.weights()
    ours, theirs = (predictions(books.objective, data.test, each) for each in (w, retrained))
    return Verdict(
        distance=(w - retrained).norm().item(),
        norm=retrained.norm().item(),
        disagreement=(ours != theirs).double().mean().item(),
        accuracy=(ours == data.test.y).double().mean().item(),
        retrained_accuracy=(theirs == data.test.y).double().mean().item(),
        seconds=seconds,
        samples=gradient.samples,
    )


def rounding(layout: Layout, w: Tensor) -> float:
    """Return how far weights may be from what they were computed as, for being kept in a shorter type."""
    return torch.finfo(torch.float32).eps * w.norm().item() if layout.dtype.itemsize == 4 else 0.0


def predictions(objective: Objective, split: Split, w: Tensor) -> Tensor:
    """Return the classes that weights w give to all samples of a split, int64 [n]."""
    return objective.logits(split, w, torch.arange(len(split))).argmax(1)


def save_weights(books: Books, name: str, w: Tensor) -> str:
    """Write weights as a model file of the run; return its digest."""
    model = new_model(books.settings, books.found.data).double()
    assign(model, w)
    save_tensors(books.storage, name, model.state_dict())
    return digest(books.storage.read(name) or b"")


def _afterwards(books: Books, change: Change, everyone: int) -> tuple[Membership, Tensor]:
    """Return who will have a place, and who will be in use."""
    membership, now = books.membership, _padded(books.active, everyone)
    if change.new:
        newcomers = torch.arange(len(books.split), everyone)
        membership = replace(membership, added=(*membership.added, newcomers))
        now[newcomers] = True
    now[change.gone], now[change.came] = False, True
    return membership, now


def _padded(active: Tensor, size: int) -> Tensor:
    return torch.cat([active, torch.zeros(size - len(active), dtype=torch.bool)])


def _when(books: Books, steps: int) -> Periodic | Tolerant:
    settings, train = books.settings.replay, books.settings.train
    if settings.tolerance is None:
        return Periodic(settings.period, settings.burn_in)
    horizon = sum(learning_rate(train, step / steps) for step in range(steps))
    return Tolerant(settings.tolerance, horizon, train.weight_decay)


def places(history: History, membership: Membership) -> Iterator[Tensor]:
    """Yield everyone with a place in each batch of the training."""
    epoch = done = 0
    while done < len(history):
        batches = membership.places(epoch)
        yield from batches
        epoch, done = epoch + 1, done + len(batches)


def changed_steps(history: History, membership: Membership, before: Tensor, now: Tensor) -> Iterator[Step]:
    """Yield the record with what becomes of each batch."""
    following = history[0]
    for number, batch in enumerate(places(history, membership)):
        record = following
        last = number + 1 == len(history)
        following = record if last else history[number + 1]
        after = history.final if last else following.w
        was, stays = before[batch], now[batch]
        yield Step(
            record.rate,
            torch.from_numpy(record.w),
            torch.from_numpy(record.gradient),
            torch.from_numpy(after),
            kept=batch[was & stays],
            gone=batch[was & ~stays],
            came=batch[stays & ~was],
        )


@contextmanager
def gradients(objective: Objective, split: Split, data: Data, cluster: Cluster) -> Iterator[Counted]:
    """Give sums of gradients over samples that this process or actors hold, in contiguous ranges."""
    held = Data(split, data.test)

    def ranges(count: int) -> list[Shard]:
        nobody = torch.arange(0)
        return [Shard(held, part, nobody) for part in torch.arange(len(split)).tensor_split(count)]

    with hold(ranges, cluster) as shards:
        yield Counted(ShardedGradient(objective, split, shards))

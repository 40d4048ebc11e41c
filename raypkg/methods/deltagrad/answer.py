"""Answering a request: the recorded training is replayed with other samples, and becomes the record of the next."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.settings import Training
from raypkg.engine.optimizer import learning_rate

from .exact_steps import ExactSteps, Periodic, Tolerant
from .history import History, HistoryWriter, Layout, check_room, history_folder
from .joined import joined
from .ledger import Entry
from .membership import Membership
from .recorded_run import Change, RecordedRun
from .replay import ChangedStep, replay
from .settings import ReplaySettings, RequestSettings
from .sharded_gradient import sharded_gradient

Follow = Callable[[Iterable[Any], int], Iterable[Any]]  # shows the progress of so many steps


def answer(run: RecordedRun, change: Change, settings: RequestSettings, follow: Follow) -> Entry:
    """Replay the training with changed samples and enter what came of it; return the log's entry.

    Everything is written beside what holds, and holds once the log has its entry: what fails before has changed nothing
    and leaves nothing, what a process that dies after has left undone is done by the next that opens the run.

    Args:
        run: the recorded run.
        change: what is to be different.
        settings: which steps are exact, and where gradients are computed.
        follow: shows progress.

    Raises:
        UserError: the disk is full or cannot be written, the record is corrupt, or the replay diverges.
    """
    try:
        return _answer(run, change, settings, follow)
    except BaseException:  # an interruption too
        with suppress(UserError):  # the next that opens the run tries again
            run.clean_up()
        raise


def _answer(run: RecordedRun, change: Change, settings: RequestSettings, follow: Follow) -> Entry:
    start = time.perf_counter()
    number = run.last["number"] + 1
    outcome = _replay_changed(run, number, change, settings, follow)
    model = run.write_model(number, outcome.w)
    return run.enter(
        {
            "kind": "change",
            "requests": list(change.requests),
            "deleted": len(change.gone),
            "restored": len(change.came),
            "new": len(change.new) if change.new else 0,
            "samples": outcome.samples,
            **run.write_change(number, change),
            "model": model,
            "history": outcome.history,
            "steps": outcome.steps,
            "exact": outcome.exact,
            "gradients": outcome.gradients,
            "estimate": outcome.estimate,
            "seconds": time.perf_counter() - start,
        }
    )


class _Outcome(NamedTuple):
    """What a replay ends with.

    Attributes:
        w: the new weights, float64 [p].
        history: digest of the new history.
        samples: that are in use now.
        steps: of the training.
        exact: how many of them were exact.
        gradients: samples whose gradients were computed.
        estimate: of the distance from the retrained weights; None where nothing estimates it.
    """

    w: Tensor
    history: str
    samples: int
    steps: int
    exact: int
    gradients: int
    estimate: float | None


def _replay_changed(
    run: RecordedRun, number: int, change: Change, settings: RequestSettings, follow: Follow
) -> _Outcome:
    """Replay the training with the change, and write the history of that beside the one that holds."""
    history = run.history()
    total = len(history)
    everyone = joined(run.split, change.new) if change.new else run.split
    before = _padded(run.active, len(everyone))
    now = _after(before, change, len(run.split))
    steps = changed_steps(history, _with_new_samples(run, change, len(everyone)), before, now)
    exact_steps = _exact_steps(settings.replay, run.settings.train, total)
    exact = 0
    with (
        _new_history(run, number, total) as writer,
        sharded_gradient(run.objective, everyone, run.test, settings.cluster) as gradient,
    ):
        writer.start()
        replayed = replay(
            steps,
            gradient,
            exact_steps,
            decay=run.settings.train.weight_decay,
            pairs=settings.replay.pairs,
            convex=run.objective.linear,
        )
        for step in follow(replayed, total):
            _check_finite(step.after)
            writer.append(step.rate, step.w, step.gradient)
            exact += step.exact
        sealed = writer.seal(step.after)
    estimate = exact_steps.estimate
    if estimate is not None:
        estimate += rounding(history.layout, step.after)
    return _Outcome(step.after, sealed, int(now.sum()), total, exact, gradient.samples, estimate)


def changed_steps(history: History, membership: Membership, before: Tensor, now: Tensor) -> Iterator[ChangedStep]:
    """Yield the record with what becomes of each batch.

    Args:
        history: the record.
        membership: which sample has a place in which batch.
        before: whether a sample was in use in the recorded training, bool [ids].
        now: whether it is in use in the replayed one, bool [ids].
    """
    following = history[0]
    for number, batch in enumerate(membership.batches(len(history)), 1):
        record = following
        if number < len(history):
            following = history[number]
            after = following.w
        else:
            after = history.final
        was = before[batch]
        stays = now[batch]
        yield ChangedStep(
            record.rate,
            record.w,
            record.gradient,
            after,
            kept=batch[was & stays],
            gone=batch[was & ~stays],
            came=batch[stays & ~was],
        )


def rounding(layout: Layout, w: Tensor) -> float:
    """Return how far weights w may be from what a history says of them that is kept in a shorter type."""
    if layout.dtype.itemsize > 4:
        return 0.0
    return torch.finfo(torch.float32).eps * w.norm().item()


def _new_history(run: RecordedRun, number: int, steps: int) -> HistoryWriter:
    folder = history_folder(run.storage, number)
    check_room(folder, run.layout, steps)
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that died
    return HistoryWriter(folder, run.layout)


def _check_finite(w: Tensor) -> None:
    if not w.isfinite().all():
        raise UserError(
            "the replay diverges: take more exact steps, by a smaller --period or a larger --burn-in, unless training"
            " with these samples diverges itself"
        )


def _with_new_samples(run: RecordedRun, change: Change, size: int) -> Membership:
    """Return which sample will have a place in which batch."""
    membership = run.membership
    if not change.new:
        return membership
    newcomers = torch.arange(len(run.split), size)
    return replace(membership, added=(*membership.added, newcomers))


def _after(before: Tensor, change: Change, known: int) -> Tensor:
    """Return whether each sample will be in use, bool [ids]; those from ``known`` on are new."""
    now = before.clone()
    now[known:] = True
    now[change.gone] = False
    now[change.came] = True
    return now


def _padded(active: Tensor, size: int) -> Tensor:
    nobody = torch.zeros(size - len(active), dtype=torch.bool)
    return torch.cat([active, nobody])


def _exact_steps(settings: ReplaySettings, train: Training, steps: int) -> ExactSteps:
    if settings.tolerance is None:
        return Periodic(settings.period, settings.burn_in)
    horizon = sum(learning_rate(train, step / steps) for step in range(steps))
    return Tolerant(settings.tolerance, horizon, train.weight_decay)

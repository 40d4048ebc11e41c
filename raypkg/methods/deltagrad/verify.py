"""Proving a run's answers: train again with the samples that are in use, and compare."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from raypkg.core.settings import Cluster
from raypkg.data.split import Split

from .answer import Follow
from .history import History
from .objective import Objective
from .recorded_run import RecordedRun
from .replay import retrain
from .sharded_gradient import sharded_gradient


class Verdict(NamedTuple):
    """How near a run's model is to the one that training without the deleted, with the added samples gives.

    Attributes:
        distance: ‖w − retrained w‖.
        norm: ‖retrained w‖.
        disagreement: share of the test samples that the two predict differently.
        accuracy: of the run's model on the test samples.
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


def compare_with_retraining(run: RecordedRun, cluster: Cluster, follow: Follow) -> Verdict:
    """Train again with the samples that are in use, from the same weights in the same order, and compare.

    Args:
        run: the recorded run.
        cluster: where gradients are computed.
        follow: shows progress.
    """
    history = run.history()
    start = time.perf_counter()
    with sharded_gradient(run.objective, run.split, run.test, cluster) as gradient:
        steps = retrain(_steps(run, history), history[0].w, gradient, decay=run.settings.train.weight_decay)
        *_, retrained = follow(steps, len(history))
    seconds = time.perf_counter() - start

    w = run.weights()
    predicted = predictions(run.objective, run.test, w)
    expected = predictions(run.objective, run.test, retrained)
    return Verdict(
        distance=(w - retrained).norm().item(),
        norm=retrained.norm().item(),
        disagreement=_share(predicted != expected),
        accuracy=_share(predicted == run.test.y),
        retrained_accuracy=_share(expected == run.test.y),
        seconds=seconds,
        samples=gradient.samples,
    )


def predictions(objective: Objective, split: Split, w: Tensor) -> Tensor:
    """Return the classes that weights w give to all samples of a split, int64 [n]."""
    return objective.logits(split, w, torch.arange(len(split))).argmax(1)


def _steps(run: RecordedRun, history: History) -> Iterator[tuple[float, Tensor]]:
    """Yield η and the samples in use of every batch."""
    for record, batch in zip(history, run.membership.batches(len(history)), strict=True):
        yield record.rate, batch[run.active[batch]]


def _share(mask: Tensor) -> float:
    return mask.double().mean().item()

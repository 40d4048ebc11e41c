"""The trials of a sweep on Ray Tune: how they are compared, run side by side, followed and interrupted."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, HyperBandScheduler, MedianStoppingRule, TrialScheduler

from .capacity import TrialSize
from .drawing import Values
from .loss import watched
from .proposals import Proposals
from .trial_process import Trial, TrialProcess

ETA = 3  # of three trials that come so far, one continues
DRIVER = {"memory": 64 * 2**20}  # what a trial around Ray Train asks for: no CPU, which its workers need
SCHEDULERS: dict[str, Callable[[int], TrialScheduler]] = {  # by the epochs of the longest trial
    "asha": lambda longest: ASHAScheduler("epoch", max_t=longest, grace_period=1, reduction_factor=ETA),
    "hyperband": lambda longest: HyperBandScheduler("epoch", max_t=longest, reduction_factor=ETA),
    "median": lambda longest: MedianStoppingRule("epoch", grace_period=1),
    "fifo": lambda longest: FIFOScheduler(),
}


class Follower(Protocol):
    """What the driver does when a trial starts and ends."""

    def started(self, number: int, values: Values) -> None:
        """Take note of a trial's settings."""

    def ended(self, number: int, error: str | None) -> None:
        """Take note that a trial is done, was stopped by the scheduler, or failed."""


@dataclass(frozen=True)
class Rules:
    """How trials are compared, and when they end.

    Attributes:
        metric: by which they are compared.
        mode: max or min.
        scheduler: which stops those that fall behind; a key of ``SCHEDULERS``.
        longest: epochs of the longest trial.
        seconds: after which no trial continues; None = never.
        failures: how often a trial whose process died is started again.
    """

    metric: str
    mode: str
    scheduler: str
    longest: int
    seconds: float | None
    failures: int


def run_trials(
    trial: Trial, proposals: Proposals, follower: Follower, size: TrialSize, rules: Rules, *, folder: str
) -> bool:
    """Run trials until all have ended, the time is over, or the user interrupts.

    Args:
        trial: importable; gets number, settings and a function that takes ``epoch`` and the metric, and returns those
            of the end, with an ``error`` where it failed. Restarted, it must resume from its own checkpoints.
        proposals: which trials.
        follower: hears of each in this process.
        size: of each.
        rules: for all of them.
        folder: where Tune keeps its own files.

    Returns:
        Whether the user interrupted.
    """
    _be_quiet()
    start = time.monotonic()
    watch = _Watch(follower, size.nested)
    trainable = tune.with_parameters(TrialProcess, trial=trial, home=os.getcwd())
    tuner = tune.Tuner(
        tune.with_resources(trainable, DRIVER if size.nested else size.plan.resources),
        tune_config=tune.TuneConfig(
            metric=rules.metric,
            mode=rules.mode,
            search_alg=proposals,
            scheduler=SCHEDULERS[rules.scheduler](rules.longest),
            num_samples=proposals.count,
            max_concurrent_trials=size.at_once,
            time_budget_s=rules.seconds,
            reuse_actors=not size.nested,  # starting Python and torch takes longer than many a trial
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder,
            verbose=0,
            callbacks=[watch],
            failure_config=tune.FailureConfig(max_failures=rules.failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    try:
        with watched():
            tuner.fit()
    except KeyboardInterrupt:  # the second one
        return True
    in_time = rules.seconds is None or time.monotonic() - start < rules.seconds
    return in_time and len(watch.ended) < proposals.count


def _be_quiet() -> None:
    """Silence Ray's loggers, and let Ctrl-C reach Tune: Ray Train and an earlier sweep leave their own handlers."""
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Watch(tune.Callback):
    """Passes on what happens to trials, by their numbers."""

    def __init__(self, follower: Follower, nested: bool):
        self._follower = follower
        self._nested = nested
        self.ended: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune stores its callbacks, and this one is never restored."""
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Tell of a trial's settings; first free the CPUs that one which died at its start would keep for ever."""
        running = any(other.status == other.RUNNING for other in trials)
        if self._nested and not running:
            _free_workers()
        self._follower.started(trial.config["number"], trial.config["values"])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Tell of its end."""
        self._end(trial, trial.last_result.get("error"))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Tell that its process died too often, or of a bug."""
        text = str(trial.get_error() or "").strip() or "its process died"
        self._end(trial, text.splitlines()[-1])

    def _end(self, trial: Any, error: str | None) -> None:
        number = trial.config["number"]
        self.ended.add(number)
        self._follower.ended(number, error)


def _free_workers() -> None:
    """Give up what this job has reserved for workers: Ray Train does not when its driver dies while they start."""
    import ray
    from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group
    from ray.util.state import list_placement_groups

    context = ray.get_runtime_context()
    of_this_job = ("creator_job_id", "=", context.get_job_id())
    # Without its address, Ray looks for a cluster, and fails where several run on one machine.
    groups = list_placement_groups(address=context.gcs_address, filters=[of_this_job], detail=True)
    for group in groups:
        for_workers = any("CPU" in bundle["unit_resources"] for bundle in group.bundles)
        if for_workers and group.state != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group.placement_group_id)))

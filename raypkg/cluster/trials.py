"""The trials of a study on Ray Tune: compared, run side by side, followed and interrupted."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from ray import tune
from ray.tune.result import DONE
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, HyperBandScheduler, MedianStoppingRule, TrialScheduler

from .capacity import TrialSize
from .search import Proposals, Values
from .session import cluster_errors

Row = dict[str, Any]  # the epoch and the metric, and an error if there was one
Tell = Callable[[Row], None]
Started = Callable[[int, Values], None]  # number and settings
Ended = Callable[[int, str | None], None]  # number of a trial that finished, was stopped or failed, and its error
Trial = Callable[[int, Values, Tell], Row]  # number, settings and a callback for rows → the last row
CLOSING = 30  # seconds for a stopped trial to close its files

ETA = 3  # one of three trials that reach a rung continues
DRIVER = {"memory": 64 * 2**20}  # request of a trial around Ray Train: no CPU, which its workers need
SCHEDULERS: dict[str, Callable[[int], TrialScheduler]] = {  # given the epochs of the longest trial
    "asha": lambda longest: ASHAScheduler("epoch", max_t=longest, grace_period=1, reduction_factor=ETA),
    "hyperband": lambda longest: HyperBandScheduler("epoch", max_t=longest, reduction_factor=ETA),
    "median": lambda longest: MedianStoppingRule("epoch", grace_period=1),
    "fifo": lambda longest: FIFOScheduler(),
}


def run_trials(
    trial: Trial,
    proposals: Proposals,
    size: TrialSize,
    *,
    started: Started,
    ended: Ended,
    metric: str,
    mode: str,
    scheduler: TrialScheduler,
    seconds: float | None,
    failures: int,
    folder: str,
) -> bool:
    """Run trials until all have ended, the time is over, or the user interrupts; return True if the user did.

    ``trial`` must be importable and, when restarted, resume from its own checkpoints. A trial whose process died is
    restarted up to ``failures`` times. ``started`` and ``ended`` are called in this process.
    Tune keeps its own files in ``folder``.
    """
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray Train and earlier studies leave their handlers
    start = time.monotonic()
    watch = _Watch(started, ended, size.nested)
    trainable = tune.with_parameters(TrialProcess, trial=trial, home=os.getcwd())
    tuner = tune.Tuner(
        tune.with_resources(trainable, DRIVER if size.nested else size.plan.resources),
        tune_config=tune.TuneConfig(
            metric=metric,
            mode=mode,
            search_alg=proposals,
            scheduler=scheduler,
            num_samples=proposals.count,
            max_concurrent_trials=size.at_once,
            time_budget_s=seconds,
            reuse_actors=not size.nested,  # starting Python and torch takes longer than a small trial
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder,
            verbose=0,
            callbacks=[watch],
            failure_config=tune.FailureConfig(max_failures=failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    try:
        with cluster_errors():
            tuner.fit()
    except KeyboardInterrupt:  # the second one
        return True
    in_time = seconds is None or time.monotonic() - start < seconds
    return in_time and len(watch.ended) < proposals.count


class _Watch(tune.Callback):
    """Reports the start and end of trials by number."""

    def __init__(self, started: Started, ended: Ended, nested: bool):
        self._started = started
        self._ended = ended
        self._nested = nested
        self.ended: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state: Tune stores its callbacks, but this one is never restored."""
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Report a trial's settings, after freeing CPUs that a trial which died at its start would hold forever."""
        if self._nested and not any(other.status == other.RUNNING for other in trials):
            _free_workers()
        self._started(trial.config["number"], trial.config["values"])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Report the end of a trial."""
        self._end(trial, trial.last_result.get("error"))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Report a trial whose process died too often, or that raised an exception."""
        text = str(trial.get_error() or "").strip() or "its process died"
        self._end(trial, text.splitlines()[-1])

    def _end(self, trial: Any, error: str | None) -> None:
        number = trial.config["number"]
        self.ended.add(number)
        self._ended(number, error)


def _free_workers() -> None:
    """Remove this job's placement groups for workers: Ray Train leaks them if its driver dies while they start."""
    import ray
    from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group
    from ray.util.state import list_placement_groups

    context = ray.get_runtime_context()
    of_this_job = ("creator_job_id", "=", context.get_job_id())
    # Without the address, Ray searches for a cluster and fails if several run on one machine.
    groups = list_placement_groups(address=context.gcs_address, filters=[of_this_job], detail=True)
    for group in groups:
        for_workers = any("CPU" in bundle["unit_resources"] for bundle in group.bundles)
        if for_workers and group.state != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group.placement_group_id)))


class TrialProcess(tune.Trainable):
    """A process of Ray Tune that runs one trial after another; each pauses at every row until Tune decides on it.

    A trial resumes from the checkpoints in its run folder, so Tune's own checkpoints are empty.
    """

    def setup(self, config: dict[str, Any], trial: Trial, home: str) -> None:
        """Start the first trial, with the number and settings in ``config``, from the user's working folder."""
        self._trial = trial
        self._home = home
        self._restore = _restoring()
        self._begin(config)

    def step(self) -> Row:
        """Return the next row of the trial."""
        row = self._paced.advance()
        return {**row, DONE: self._paced.ended}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another trial; return True if the old one has ended."""
        if not self._paced.stop(CLOSING):
            return False
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """Let the trial close its files before the process ends."""
        self._paced.stop(CLOSING)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Return an empty checkpoint: HyperBand saves trials in order to pause them."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Do nothing: the run folder has the checkpoints."""

    def _begin(self, config: dict[str, Any]) -> None:
        number = config["number"]
        values = dict(config["values"])
        self._restore()
        if os.path.isdir(self._home):  # it may not exist on another machine
            os.chdir(self._home)
        self._paced = Paced(lambda tell: self._trial(number, values, tell))


def _restoring() -> Callable[[], None]:
    """Return a function that restores what a trial may change for the next: all but the modules that it imported."""
    import torch

    environment, path = dict(os.environ), [*sys.path]
    state, threads, dtype = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()

    def restore() -> None:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        sys.path[:] = path
        torch.set_rng_state(state)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)

    return restore


class Paced:
    """A function in a thread of its own that pauses at every row it reports, from any thread, by the callback.

    >>> def count(tell):
    ...     tell({"epoch": 1})
    ...     return {"epoch": 2}
    >>> paced = Paced(count)
    >>> paced.advance(), paced.ended
    ({'epoch': 1}, False)
    >>> paced.advance(), paced.ended
    ({'epoch': 2}, True)
    """

    def __init__(self, function: Callable[[Tell], Row]):
        self.ended = False
        self._function = function
        self._rows: SimpleQueue[Row | Exception] = SimpleQueue()
        self._turns = threading.Semaphore(0)
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="trial", daemon=True)
        self._reporter = self._thread  # with Ray Train inside, rows come from the mailbox's thread
        self._thread.start()

    def advance(self) -> Row:
        """Return the next row, or raise the function's exception."""
        self._turns.release()
        row = self._rows.get()
        if isinstance(row, Exception):
            raise row
        return row

    def stop(self, seconds: float) -> bool:
        """End the waiting function by ``SystemExit``; return True if its thread has ended.

        Waits up to ``seconds`` for the reporting thread to unwind and close its files.
        """
        self._stopped = True
        self._turns.release()
        self._reporter.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        last: Row | Exception
        try:
            self._await_turn()
            last = self._function(self._tell)
        except Exception as error:
            last = error
        except SystemExit as error:  # raised by the user's code, it would end the process without a result
            last = RuntimeError(f"the trial ended itself by {error!r}")
        self.ended = True
        self._rows.put(last)

    def _tell(self, row: Row) -> None:
        self._reporter = threading.current_thread()
        self._rows.put(row)
        self._await_turn()

    def _await_turn(self) -> None:
        self._turns.acquire()
        if self._stopped:
            raise SystemExit

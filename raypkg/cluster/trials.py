"""The trials of a study on Ray Tune: their settings drawn, from a grid or by Optuna; run side by side and followed."""

import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from math import prod
from queue import SimpleQueue
from typing import Any

import numpy as np
from ray import tune
from ray.tune.result import DONE
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, HyperBandScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.sample import Categorical, Domain, Float, Function, Integer, Quantized

from raypkg.core.errors import UserError

from .session import Plan, cluster_errors

Values = dict[str, Any]  # settings of a trial, by dotted names
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
LARGEST_GRID = 10_000  # trials


def candidates(domain: Any) -> list[Any]:
    """Return the values of a domain to validate: every choice, both ends of a range, a plain value."""
    match domain:
        case {"grid_search": values}:
            return [_plain(value) for value in values]
        case Categorical():
            return [_plain(value) for value in domain.categories]
        case Integer():
            # Tune excludes the upper end of a range of integers, unless the range has steps.
            has_steps = isinstance(domain.get_sampler(), Quantized)
            return [domain.lower, domain.upper if has_steps else domain.upper - 1]
        case Float():
            ends = (domain.lower, domain.upper)
            return [end for end in ends if np.isfinite(end)]
        case Domain():
            return []
    return [_plain(domain)]


def constants(space: Mapping[str, Any]) -> Values:
    """Return the settings to which a space gives a plain value."""
    return {name: _plain(value) for name, value in space.items() if not isinstance(value, Domain | dict)}


def draw_settings(space: Mapping[str, Any], rng: np.random.Generator) -> Values:
    """Return one value of every domain."""
    values = {}
    for name, domain in space.items():
        if isinstance(domain, dict) and "grid_search" in domain:
            domain = tune.choice(list(domain["grid_search"]))
        is_domain = isinstance(domain, Domain)
        values[name] = _plain(domain.sample(random_state=rng) if is_domain else domain)
    return values


def grid(space: Mapping[str, Any]) -> Iterable[Values]:
    """Return every combination of the space's choices; refuse ranges that are continuous or have steps."""
    axes: list[range | list[Any]] = []
    for name, domain in space.items():
        has_steps = isinstance(domain, Integer) and isinstance(domain.get_sampler(), Quantized)
        if has_steps or isinstance(domain, Float | Function):
            problem = f"{name} is drawn from a continuous range, or one with steps"
            raise UserError(f"--search grid: {problem}; list its values or use random")
        axes.append(range(domain.lower, domain.upper) if isinstance(domain, Integer) else candidates(domain))
    combinations = prod(len(axis) for axis in axes)
    if combinations > LARGEST_GRID:
        raise UserError(f"--search grid: {combinations:,} combinations, at most {LARGEST_GRID:,} are allowed")
    return (dict(zip(space, values, strict=True)) for values in product(*axes))


def _plain(value: Any) -> Any:
    """Return a NumPy number as a Python number, which JSON and TOML can store."""
    return value.item() if isinstance(value, np.generic) else value


def optuna(
    space: Mapping[str, Any], metric: str, mode: str, seed: int, done: Sequence[tuple[Values, float]]
) -> Searcher:
    """Return Optuna's sampler on a space, informed by the settings and the metric of the trials already done."""
    from ray.tune.search.optuna import OptunaSearch

    if not find_spec("optuna"):
        raise UserError("--search optuna needs Optuna: pip install 'effray[optuna]'")
    fixed = constants(space)
    varied = {name: domain for name, domain in space.items() if name not in fixed}
    logging.getLogger("optuna").setLevel(logging.WARNING)
    try:
        distributions = OptunaSearch.convert_search_space(varied)
        searcher = OptunaSearch(distributions, metric=metric, mode=mode, seed=seed % 2**32)
    except ValueError as error:
        raise UserError(f"--search optuna: {error}") from None
    for values, reached in done:
        point = {name: values[name] for name in varied}
        searcher.add_evaluated_point(point, reached)
    return searcher


class Proposals(Searcher):
    """Supplies trials: the waiting ones, then ``further`` numbers with the searcher's settings and the fixed ones."""

    def __init__(
        self,
        waiting: Iterable[tuple[int, Values]],
        searcher: Searcher | None = None,
        further: Iterable[int] = (),
        fixed: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self._waiting = deque(waiting)
        self._searcher = searcher
        self._further = deque(further)
        self._fixed = dict(fixed or {})
        self._known: dict[str, Values] = {}  # settings of known trials by Tune's trial ids
        self.count = len(self._waiting) + len(self._further)

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's number and settings."""
        if self._waiting:
            number, values = self._waiting.popleft()
            self._known[trial_id] = values
            return {"number": number, "values": values}
        if not (self._searcher and self._further):
            return Searcher.FINISHED
        suggested = self._searcher.suggest(trial_id)
        if not isinstance(suggested, dict):  # nothing yet, or finished
            return suggested
        return {"number": self._further.popleft(), "values": self._fixed | suggested}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass a trial's result to the searcher."""
        if self._searcher is None:
            return
        if trial_id not in self._known:
            self._searcher.on_trial_complete(trial_id, result, error)
        elif result and self._searcher.metric in result:
            values = self._known[trial_id]
            varied = {name: value for name, value in values.items() if name not in self._fixed}
            self._searcher.add_evaluated_point(varied, result[self._searcher.metric])


def run_trials(
    trial: Trial,
    proposals: Proposals,
    size: Plan,
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
    nested = size.of_a_trial > 0
    watch = _Watch(started, ended, nested)
    trainable = tune.with_parameters(TrialProcess, trial=trial, home=os.getcwd())
    tuner = tune.Tuner(
        tune.with_resources(trainable, DRIVER if nested else size.resources),
        tune_config=tune.TuneConfig(
            metric=metric,
            mode=mode,
            search_alg=proposals,
            scheduler=scheduler,
            num_samples=proposals.count,
            max_concurrent_trials=size.at_once,
            time_budget_s=seconds,
            reuse_actors=not nested,  # starting Python and torch takes longer than a small trial
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
            # Ray Train leaks its placement group for workers if its driver dies while they start.
            import ray
            from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group
            from ray.util.state import list_placement_groups

            context = ray.get_runtime_context()
            of_this_job = ("creator_job_id", "=", context.get_job_id())
            # Without the address, Ray searches for a cluster and fails if several run on one machine.
            for group in list_placement_groups(address=context.gcs_address, filters=[of_this_job], detail=True):
                for_workers = any("CPU" in bundle["unit_resources"] for bundle in group.bundles)
                if for_workers and group.state != "REMOVED":
                    remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group.placement_group_id)))
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


class TrialProcess(tune.Trainable):
    """A process of Ray Tune that runs one trial after another, each in a thread that pauses at every row it reports.

    So Tune decides on a row before the next one is computed. A trial resumes from the checkpoints in its run folder:
    Tune's own are empty.
    """

    def setup(self, config: dict[str, Any], trial: Trial, home: str) -> None:
        """Start the first trial, with the number and settings in ``config``, from the user's working folder."""
        import torch

        environment, path = dict(os.environ), [*sys.path]
        state, threads, dtype = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()

        def restore() -> None:  # what a trial may change for the next: all but the modules that it imported
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
            sys.path[:] = path
            torch.set_rng_state(state)
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)

        self._trial = trial
        self._home = home
        self._restore = restore
        self._begin(config)

    def step(self) -> Row:
        """Return the next row of the trial, or raise its exception."""
        self._turns.release()
        row = self._rows.get()
        if isinstance(row, Exception):
            raise row
        return {**row, DONE: self._has_ended}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another trial; return True if the old one has ended."""
        self.cleanup()
        if self._thread.is_alive():
            return False
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """End a waiting trial by ``SystemExit``; wait until the thread that reports its rows has closed its files."""
        self._stopped = True
        self._turns.release()
        self._reporter.join(CLOSING)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Return an empty checkpoint: HyperBand saves trials in order to pause them."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Do nothing: the run folder has the checkpoints."""

    def _begin(self, config: dict[str, Any]) -> None:
        self._restore()
        if os.path.isdir(self._home):  # it may not exist on another machine
            os.chdir(self._home)
        self._rows: SimpleQueue[Row | Exception] = SimpleQueue()
        self._turns = threading.Semaphore(0)
        self._stopped = self._has_ended = False
        settings = (config["number"], dict(config["values"]))
        self._thread = threading.Thread(target=self._work, args=settings, name="trial", daemon=True)
        self._reporter = self._thread  # with Ray Train inside, rows come from the mailbox's thread
        self._thread.start()

    def _work(self, number: int, values: Values) -> None:
        last: Row | Exception
        try:
            self._await_turn()
            last = self._trial(number, values, self._tell)
        except Exception as error:
            last = error
        except SystemExit as error:  # raised by the user's code, it would end the process without a result
            last = RuntimeError(f"the trial ended itself by {error!r}")
        self._has_ended = True
        self._rows.put(last)

    def _tell(self, row: Row) -> None:
        self._reporter = threading.current_thread()
        self._rows.put(row)
        self._await_turn()

    def _await_turn(self) -> None:
        self._turns.acquire()
        if self._stopped:
            raise SystemExit

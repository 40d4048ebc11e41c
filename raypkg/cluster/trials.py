"""Trials on Ray Tune: each in a process that the next one takes over, or around a Ray Train group of its own."""

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from math import prod
from typing import Any, Protocol

import numpy as np

from raypkg.core.errors import UserError
from raypkg.core.settings import Cluster

from .session import Plan, plan, processors, room

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the run folders have it all
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a failed trial reports why instead of a metric
os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "30")  # a stopped trial may take so long to close its files

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, HyperBandScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.sample import Categorical, Domain, Float, Function, Integer, Quantized

Values = dict[str, Any]  # dotted settings
Proposal = tuple[int, Values]  # a trial's number and what it sets
CLOSING = 20  # seconds for a stopped trial to close its files
LARGEST_GRID = 10_000  # trials
ETA = 3  # of three trials that come so far, one goes on
DRIVER = {"memory": 64 * 2**20}  # what a trial around Ray Train asks for: no CPU, which its workers need
SCHEDULERS: dict[str, Callable[[int], TrialScheduler]] = {
    "asha": lambda longest: ASHAScheduler("epoch", max_t=longest, grace_period=1, reduction_factor=ETA),
    "hyperband": lambda longest: HyperBandScheduler("epoch", max_t=longest, reduction_factor=ETA),
    "median": lambda longest: MedianStoppingRule("epoch", grace_period=1),
    "none": lambda longest: FIFOScheduler(),
}


class Follower(Protocol):
    """What the driver does when a trial starts and ends."""

    def started(self, number: int, values: Values) -> None:
        """Take note of a trial's settings."""

    def ended(self, number: int, error: str | None) -> None:
        """Take note that a trial is done, was stopped by the scheduler, or failed."""


@dataclass(frozen=True)
class Size:
    """What a trial takes of the cluster.

    Attributes:
        plan: of its workers.
        nested: whether Ray Train runs them; otherwise the trial's own process is the only one.
        at_once: trials side by side.
    """

    plan: Plan
    nested: bool
    at_once: int

    @property
    def workers(self) -> int:
        """The setting ``cluster.workers`` of a trial: 0 where its own process is the only one."""
        return self.plan.workers if self.nested else 0


@dataclass(frozen=True)
class Rules:
    """How trials are compared, and when they end.

    Attributes:
        metric: by which they are compared.
        mode: max or min.
        scheduler: which stops those that fall behind; a key of ``SCHEDULERS``.
        longest: epochs of the longest trial.
        seconds: after which no trial goes on; None = never.
        failures: how often a trial whose process died is started again.
    """

    metric: str
    mode: str
    scheduler: str
    longest: int
    seconds: float | None
    failures: int


def candidates(domain: Any) -> list[Any]:
    """Return what must be allowed for all of a domain to be: each of a choice, the ends of a range, a plain value."""
    match domain:
        case {"grid_search": values}:
            return [_plain(value) for value in values]
        case Categorical():
            return [_plain(value) for value in domain.categories]
        case Integer():
            return [domain.lower, domain.upper - (not _in_steps(domain))]
        case Float():
            return [end for end in (domain.lower, domain.upper) if np.isfinite(end)]
        case Domain():
            return []
    return [_plain(domain)]


def draw_settings(space: Mapping[str, Any], rng: np.random.Generator) -> Values:
    """Return one value of every domain."""
    return {name: _drawn(domain, rng) for name, domain in space.items()}


def grid(space: Mapping[str, Any]) -> Iterable[Values]:
    """Yield every combination of the space's choices.

    Raises:
        UserError: a domain is continuous, or has steps that only Ray knows, or there are too many combinations.
    """
    axes = []
    for name, domain in space.items():
        if isinstance(domain, Float | Function) or (isinstance(domain, Integer) and _in_steps(domain)):
            raise UserError(
                f"--search grid: {name} is drawn from a continuous range, or one with steps; list its values or use"
                " random"
            )
        axes.append(range(domain.lower, domain.upper) if isinstance(domain, Integer) else candidates(domain))
    if (combinations := prod(len(axis) for axis in axes)) > LARGEST_GRID:
        raise UserError(f"--search grid: {combinations:,} combinations, of which {LARGEST_GRID:,} can be tried")
    return (dict(zip(space, values, strict=True)) for values in product(*axes))


def _in_steps(domain: Integer) -> bool:
    """Say whether a range has steps, and then an end that belongs to it."""
    return isinstance(domain.get_sampler(), Quantized)


def constants(space: Mapping[str, Any]) -> Values:
    """Return what a space gives a single plain value."""
    return {name: _plain(value) for name, value in space.items() if not isinstance(value, Domain | dict)}


def optuna(
    space: Mapping[str, Any], metric: str, mode: str, seed: int, told: Sequence[tuple[Values, float]]
) -> Searcher:
    """Return Optuna's sampler on a space, told of the trials that are done.

    Raises:
        UserError: Optuna is not installed, or the space has a domain that it does not know.
    """
    from ray.tune.search.optuna import OptunaSearch

    if not find_spec("optuna"):
        raise UserError("--search optuna needs Optuna: pip install 'effray[optuna]'")
    varied = {name: domain for name, domain in space.items() if name not in constants(space)}
    if not varied:
        raise UserError("--search optuna: the space has plain values only, and nothing to search")
    logging.getLogger("optuna").setLevel(logging.WARNING)
    try:
        known = OptunaSearch.convert_search_space(varied)
        search = OptunaSearch(known, metric=metric, mode=mode, seed=seed % 2**32)
    except ValueError as error:
        raise UserError(f"--search optuna: {error}") from None
    for values, reached in told:
        search.add_evaluated_point({name: values[name] for name in varied}, reached)
    return search


class Proposals(Searcher):
    """Hands out numbered trials: those whose settings are known first, then what a searcher suggests.

    Args:
        waiting: trials whose settings are known.
        searcher: suggests those of further ones.
        further: their numbers.
        fixed: what each of them sets as well.
    """

    def __init__(
        self,
        waiting: Iterable[Proposal],
        searcher: Searcher | None = None,
        further: Iterable[int] = (),
        fixed: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self._fixed = dict(fixed or {})
        self._waiting, self._searcher, self._further = deque(waiting), searcher, deque(further)
        self.count = len(self._waiting) + len(self._further)
        self._known: dict[str, Values] = {}  # of waiting trials, by Tune's name for them

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's number and settings."""
        if self._waiting:
            number, values = self._waiting.popleft()
            self._known[trial_id] = values
        elif self._searcher and self._further:
            suggested = self._searcher.suggest(trial_id)
            if not isinstance(suggested, dict):
                return suggested
            number, values = self._further.popleft(), self._fixed | suggested
        else:
            return Searcher.FINISHED
        return {"number": number, "values": values}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the searcher what came of a trial."""
        if self._searcher and trial_id not in self._known:
            self._searcher.on_trial_complete(trial_id, result, error)
        elif self._searcher and result and self._searcher.metric in result:
            varied = {name: value for name, value in self._known[trial_id].items() if name not in self._fixed}
            self._searcher.add_evaluated_point(varied, result[self._searcher.metric])


def size_of(cluster: Cluster, actors: int, concurrent: int | None) -> Size:
    """Choose how a trial runs on the cluster that was joined.

    A trial of one process without a GPU runs in the process that Tune gives it; any other needs Ray Train.

    Args:
        cluster: of one trial; workers left out = one.
        actors: that a trial starts beside its workers, of one CPU each.
        concurrent: trials at once; None = as many as fit.

    Raises:
        UserError: one trial does not fit, or not so many.
    """
    size = plan(cluster.model_copy(update={"workers": cluster.workers or 1}))
    if cluster.workers == 0:
        size = Plan(1, size.cpus, 0)
    everyone, slots = size.workers + actors, room(size.cpus, size.gpus)
    fit = min(slots // size.workers, int(processors() // (size.workers * size.cpus + actors)))
    if not fit:
        raise UserError(
            f"a trial of {size.workers} workers and {actors} actors does not fit the cluster, which has room for"
            f" {slots} workers of {size.cpus} CPU and {size.gpus:g} GPU, and {processors():g} CPU in all: lower one or"
            " the other"
        )
    if concurrent and concurrent > fit:
        raise UserError(f"--concurrent {concurrent}: the cluster has room for {fit} trials of {everyone} processes")
    return Size(size, everyone > 1 or size.gpus > 0, concurrent or fit)


def run_trials(
    trial: Callable[[int, Values, Callable[[dict[str, Any]], None]], None],
    proposals: Proposals,
    follower: Follower,
    size: Size,
    rules: Rules,
    *,
    folder: str,
) -> bool:
    """Run trials until all have ended, the time is over, or the user interrupts.

    Args:
        trial: importable; gets number, settings and a function that takes ``epoch`` and the metric, at last those of
            the end, with an ``error`` where it failed. Restarted, it must go on from its own checkpoints.
        proposals: which trials.
        follower: hears of each in this process.
        size: of each.
        rules: for all of them.
        folder: where Tune keeps its own files.

    Returns:
        Whether the user interrupted.
    """
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray Train and an earlier sweep leave their own
    resources = DRIVER if size.nested else size.plan.resources
    start = time.monotonic()
    watch = _Watch(follower, size.nested)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_in_trial, trial=trial, home=os.getcwd()), resources),
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
        ),
    )
    try:
        tuner.fit()
    except KeyboardInterrupt:  # the second one
        return True
    in_time = rules.seconds is None or time.monotonic() - start < rules.seconds
    return in_time and len(watch.ended) < proposals.count


class _Watch(tune.Callback):
    """Passes on what happens to trials, by their numbers."""

    def __init__(self, follower: Follower, nested: bool):
        self._follower, self._nested = follower, nested
        self.ended: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune stores its callbacks, and this one is never restored."""
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Tell of a trial's settings; it finds the CPUs free that one which died at its start would keep for ever."""
        if self._nested and not any(other.status == other.RUNNING for other in trials):
            _free_workers()
        self._follower.started(trial.config["number"], trial.config["values"])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Tell of its end."""
        self._end(trial, trial.last_result.get("error"))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Tell that its process died too often, or a bug."""
        text = str(trial.get_error() or "").strip() or "its process died"
        self._end(trial, text.splitlines()[-1])

    def _end(self, trial: Any, error: str | None) -> None:
        self.ended.add(trial.config["number"])
        self._follower.ended(trial.config["number"], error)


def _free_workers() -> None:
    """Give up what this job has reserved for workers: Ray Train does not when its driver dies while they start."""
    import ray
    from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group
    from ray.util.state import list_placement_groups

    job = ray.get_runtime_context().get_job_id()
    for group in list_placement_groups(filters=[("creator_job_id", "=", job)], detail=True):
        if group.state != "REMOVED" and any("CPU" in bundle["unit_resources"] for bundle in group.bundles):
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group.placement_group_id)))


class _Closing:
    """Has a trial that Tune stops wait for the thread that reports to close its files."""

    reporter: threading.Thread | None = None

    def cleanup(self) -> None:
        """Let the next report end its thread, and wait for that."""
        super().cleanup()  # type: ignore[misc]  # of Tune's class for functions, which this is mixed into
        if _Closing.reporter:
            _Closing.reporter.join(CLOSING)


def _in_trial(config: dict[str, Any], trial: Callable[..., None], home: str) -> None:
    """Run a trial in the process that Tune gives it, from the folder that the user is in."""
    if os.path.isdir(home):  # on another machine it may not be there
        os.chdir(home)

    def tell(row: dict[str, Any]) -> None:
        _Closing.reporter = threading.current_thread()
        tune.report(row)  # ends the thread by SystemExit where the trial is stopped

    trial(config["number"], dict(config["values"]), tell)


_in_trial.__mixins__ = (_Closing,)  # type: ignore[attr-defined]  # read by Tune


def _drawn(domain: Any, rng: np.random.Generator) -> Any:
    match domain:
        case {"grid_search": values}:
            domain = tune.choice(list(values))
        case Domain():
            pass
        case _:
            return _plain(domain)
    return _plain(domain.sample(random_state=rng))


def _plain(value: Any) -> Any:
    """Return a number of NumPy's as Python's, which JSON and TOML hold."""
    return value.item() if isinstance(value, np.generic) else value

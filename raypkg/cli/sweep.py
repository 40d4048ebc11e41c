"""A sweep: settings and a space → numbered trials on Ray Tune → the table, the plots, the best settings."""

import math
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console

from raypkg.core.config import Settings, leaves, load, read_toml
from raypkg.core.errors import UserError, unknown
from raypkg.core.registry import Entry
from raypkg.core.seeds import derive
from raypkg.experiments import experiment, settings_of
from raypkg.runs import folder as run_folder
from raypkg.runs.show import terminal
from raypkg.runs.storage import Storage
from raypkg.runs.sweep import DONE, METRICS, SweepFolder, create, find, measured
from raypkg.runs.sweep_show import conclude, show_sweep

from . import proxy
from .execute import carry_out, check_names, with_absolute_path
from .options import ROOT
from .spaces import Space, check_space, check_trial, find_space, read_space

SAMPLES = 8
WORST = 1e30  # of which schedulers can take means
EVALUATE = "train.evaluate_every"  # 1 in a sweep, unless given: schedulers compare trials epoch by epoch


@dataclass(frozen=True)
class Order:
    """What was asked for; None = left out."""

    experiment: str
    space: str | None = None
    samples: int | None = None
    metric: str | None = None
    mode: str | None = None
    scheduler: str | None = None
    search: str | None = None
    concurrent: int | None = None
    time_budget: float | None = None
    proxy: float | None = None
    proxy_method: str | None = None

    @classmethod
    def options(cls) -> list[str]:
        """Return the names of what a user may ask for."""
        return [field.name for field in fields(cls) if field.name != "experiment"]


def start_sweep(
    entry: Entry, order: Order, config: Path | None, values: Mapping[str, Any], name: str | None, root: str
) -> None:
    """Check everything, then run a new sweep; a mistake leaves no folder behind and starts no Ray.

    Raises:
        UserError: bad settings, a bad space, or an order that cannot be carried out.
    """
    schema = settings_of(entry)
    settings = with_absolute_path(load(schema, _base(schema, config), values))
    check_names(settings)
    file = find_space(order.space or entry.name)
    space = _without(read_space(file.read_text(), str(file)), values)
    order = _filled(order, space, settings)
    proxy.check(order, settings)
    check_space(schema, settings, space, check_names)
    trials, check = _trials(order, space, settings), _check(settings, order)
    for trial in trials:
        check_trial(schema, settings, trial, check)
    order = replace(order, samples=len(trials) or order.samples)
    from raypkg.cluster.tune import size_of

    size = size_of(settings.cluster, settings.actors, order.concurrent)
    name = f"{entry.name}-{time.strftime('%m%d-%H%M%S')}" if name is None else name
    only = {proxy.ONLY: proxy.coreset_of(root, name)} if order.proxy else {}
    asked = asdict(order) | {"varied": [*space.domains], "fixed": only}
    sweep = create(root, name, asked, settings, space.text, [trial | only for trial in trials])
    _run(entry, sweep, settings, space, size, root)


def resume_sweep(entry: Entry, name: str, root: str, refused: Sequence[str]) -> None:
    """Run the trials of a sweep that are not done; what is done is not run again.

    Raises:
        UserError: no such sweep of this experiment, or options that it has already.
    """
    if refused:
        raise UserError(f"--resume {name} keeps what was asked for: {refused[0]} cannot change")
    sweep = find(root, name)
    if sweep.order["experiment"] != entry.name:
        raise UserError(f"sweep {name!r} is of {sweep.order['experiment']}, not of {entry.name}")
    settings = load(settings_of(entry), sweep.config)
    whole = read_space(sweep.space, f"{sweep.storage.root}/space.py")
    space = _without(whole, whole.domains.keys() - sweep.order["varied"])
    if not _left(sweep) and not proxy.enlist(sweep):
        conclude(sweep)
        show_sweep(sweep, terminal())
        return
    from raypkg.cluster.tune import size_of

    size = size_of(settings.cluster, settings.actors, sweep.order["concurrent"])
    _run(entry, sweep, settings, space, size, root)


def run_trial(
    number: int, values: dict[str, Any], tell: Callable[[dict[str, Any]], None], *, root: str, workers: int
) -> None:
    """Run one trial in its run folder, or go on with it there; what is done is only reported.

    A trial that fails is told of with the worst value there is: schedulers compare it with others.

    Args:
        number: of the trial.
        values: what it sets.
        tell: takes the epoch and the metric, and an error if there was one.
        root: of the sweep's folder.
        workers: of the trial; 0 = this process.
    """
    sweep = SweepFolder(Storage(root))
    entry, metric, run = experiment[sweep.order["experiment"]], sweep.order["metric"], sweep.run(number)
    from raypkg.engine.worker import forget_peak_memory

    forget_peak_memory()  # of the trial before, whose process this is
    try:
        if not run.summary:
            settings = load(settings_of(entry), sweep.config, values | {"cluster.workers": workers})
            if "config.toml" not in run.storage.list():
                run = run_folder.create(root.rsplit("/", 2)[0], entry.name, run.name, settings)

            def listen(row: Mapping[str, Any]) -> None:
                # The last epoch is told of when the run is complete: a trial stopped there would have been for nothing.
                if row["phase"] == "train" and row["epoch"] < settings.epochs and row.get(metric) is not None:
                    run.flush()  # before Tune may stop the trial, of which the driver then reads
                    tell({"epoch": row["epoch"], metric: row[metric]})

            carry_out(entry, settings, run, Console(quiet=True), group=sweep.name, listen=listen)
        found = measured(run)
        if metric not in found:
            raise UserError(f"metric {metric} was not measured in its {found['epochs']} epochs: see {EVALUATE}")
        tell({"epoch": found["epochs"], metric: found[metric]})
    except Exception as error:  # a process that is lost starts again; what a run raises, it would raise again
        worst = -WORST if sweep.order["mode"] == "max" else WORST
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        tell({"epoch": max(1, measured(run)["epochs"]), metric: worst, "error": what.replace("\n", " ")})


class Progress:
    """Keeps and prints how the trials of a sweep end."""

    def __init__(self, sweep: SweepFolder, console: Console):
        self._sweep, self._console = sweep, console

    def started(self, number: int, values: dict[str, Any]) -> None:
        """Keep a trial's settings."""
        self._sweep.started(number, values)

    def ended(self, number: int, error: str | None) -> None:
        """Keep and print how it ended."""
        sweep, metric = self._sweep, self._sweep.order["metric"]
        sweep.ended(number, error)
        value = measured(sweep.run(number)).get(metric)
        what = error or ("" if value is None else f"{metric} {value:.4g}")
        self._console.print(f"{sweep.run_name(number)} {sweep.state(number)}: {what}", soft_wrap=True)


def _run(entry: Entry, sweep: SweepFolder, settings: Any, space: Space, size: Any, root: str) -> None:
    console = terminal()
    deadline = time.monotonic() + (sweep.order["time_budget"] or math.inf)
    try:
        if sweep.order["proxy"]:
            proxy.select(sweep, settings, size.workers, console)
        finals = sweep.finals()  # of a sweep that goes on
        waiting = [trial for trial in sweep.waiting() if trial[0] not in finals]
        interrupted = _attempt(sweep, settings, space, size, waiting, sweep.further(), deadline, console)
        if not interrupted:
            proxy.enlist(sweep)
            waiting = [trial for trial in sweep.waiting() if trial[0] in sweep.finals()]
            interrupted = _attempt(sweep, settings, space, size, waiting, [], deadline, console)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        conclude(sweep)
    show_sweep(sweep, console)
    again = f"effray tune {entry.name} --resume {sweep.name}" + (f" --root {root}" if root != ROOT else "")
    if interrupted:
        raise UserError(f"interrupted, {_left(sweep)} trials left; go on with: {again}")
    if left := _left(sweep):
        console.print(f"{left} of {len(sweep.trials)} trials are not done; go on with: {again}", soft_wrap=True)
    if settings.track.name == "wandb" and (line := _sync(sweep)):
        console.print(line, soft_wrap=True)


def _attempt(
    sweep: SweepFolder,
    settings: Any,
    space: Space,
    size: Any,
    waiting: Sequence[tuple[int, dict[str, Any]]],
    further: Sequence[int],
    deadline: float,
    console: Console,
) -> bool:
    """Run trials whose settings are known, and further ones; return whether the user interrupted."""
    from raypkg.cluster.tune import Proposals, Rules, constants, optuna, run_trials

    order, left = sweep.order, deadline - time.monotonic()
    if not (waiting or further) or left <= 0:
        return False
    searcher = None
    if further:
        done = [row for row in sweep.results() if row["state"] == DONE and row.get(order["metric"]) is not None]
        told = [(row, row[order["metric"]]) for row in done]
        searcher = optuna(space.domains, order["metric"], order["mode"], settings.seed, told)
    finals = not further and {number for number, _ in waiting} <= sweep.finals()
    how = f"{size.workers} workers each, by Ray Train" if size.workers else "one process each"
    what = f"trials of {order['experiment']}{' on all samples' if finals else ''}"
    console.print(f"{sweep.name}: {len(waiting) + len(further)} {what}, {how}, {size.at_once} at once")
    rules = Rules(
        metric=order["metric"],
        mode=order["mode"],
        scheduler="none" if finals else order["scheduler"],
        longest=_longest(settings, space, [values for _, values in waiting]),
        seconds=left if math.isfinite(left) else None,
        failures=settings.cluster.max_failures,
    )
    interrupted = run_trials(
        partial(run_trial, root=sweep.storage.root, workers=size.workers),
        Proposals(waiting, searcher, further, constants(space.domains) | order["fixed"]),
        Progress(sweep, console),
        size,
        rules,
        folder=f"{sweep.storage.root}/ray",
    )
    sweep.storage.delete_folder("ray")
    return interrupted


def _check(settings: Any, order: Order) -> Callable[[Any], None]:
    """Return what refuses settings of a trial that a single run, on all samples or on the proxy's, would refuse."""
    from raypkg.phases.samples import samples

    n = len(samples(settings.dataset, settings.seed).kept)

    def check(trial: Any) -> None:
        check_names(trial)
        trial.check(n)
        if order.proxy:
            trial.check(max(1, round(order.proxy * n)))

    return check


def _longest(settings: Any, space: Space, known: Iterable[Mapping[str, Any]]) -> int:
    """Return the epochs of the longest trial, of those that are known and those that the space allows."""
    from raypkg.cluster.tune import candidates

    def epochs(values: Mapping[str, Any]) -> int:
        return load(type(settings), settings.model_dump(mode="json"), values).epochs

    tried = {name: [(epochs({name: value}), value) for value in candidates(d)] for name, d in space.domains.items()}
    longest = {name: max(values, key=itemgetter(0))[1] for name, values in tried.items() if values}
    return max(epochs(values) for values in (longest, *known))


def _base(schema: type[Settings], config: Path | None) -> dict[str, Any]:
    """Return what the file sets, and a look at the held-out samples after every epoch unless it says otherwise."""
    base = read_toml(config) if config else {}
    train = base.get("train", {})
    if EVALUATE in dict(leaves(schema)) and isinstance(train, dict):
        base["train"] = {"evaluate_every": 1, **train}
    return base


def _without(space: Space, given: Iterable[str]) -> Space:
    """Return the space without the settings that the user gave."""
    domains = {name: domain for name, domain in space.domains.items() if name not in {*given}}
    if not domains:
        raise UserError(f"nothing is left to vary: {', '.join(space.domains)} are given")
    return Space(space.text, domains, space.metric, space.mode)


def _filled(order: Order, space: Space, settings: Any) -> Order:
    """Return the order with nothing left out.

    Raises:
        UserError: it cannot be carried out.
    """
    metric = order.metric or space.metric
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    mode = order.mode or (space.mode if metric == space.metric else METRICS[metric].mode)
    if mode not in ("max", "min"):
        raise unknown("mode", str(mode), ("max", "min"))
    scheduler, search = order.scheduler or "asha", order.search or "random"
    if scheduler != "none" and not METRICS[metric].each_epoch:
        raise UserError(
            f"metric {metric} is known only at the end of a trial, so --scheduler {scheduler} could not act on it:"
            " give --scheduler none, or --metric accuracy"
        )
    if metric in ("accuracy", "valid_loss"):
        if not settings.dataset.validation:
            raise UserError(f"metric {metric} is measured on held-out samples: dataset.validation = 0 holds out none")
        if not 0 < settings.train.evaluate_every <= settings.epochs:
            raise UserError(
                f"metric {metric} would never be measured: {EVALUATE} = {settings.train.evaluate_every} of"
                f" {settings.epochs} epochs"
            )
    for option, value in (("samples", order.samples), ("concurrent", order.concurrent)):
        if value is not None and value < 1:
            raise UserError(f"--{option} {value}: at least 1")
    if search == "grid" and order.samples:
        raise UserError(f"--samples {order.samples}: a grid has as many trials as combinations")
    return replace(
        order,
        samples=order.samples or SAMPLES,
        metric=metric,
        mode=mode,
        scheduler=scheduler,
        search=search,
        proxy_method=(order.proxy_method or "gradmatch") if order.proxy else order.proxy_method,
    )


def _trials(order: Order, space: Space, settings: Any) -> list[dict[str, Any]]:
    """Return what each trial sets, as far as it is known beforehand.

    Raises:
        UserError: a grid over a range, or a searcher that is not installed.
    """
    import numpy as np

    from raypkg.cluster.tune import draw, grid, optuna

    match order.search:
        case "grid":
            return list(grid(space.domains))
        case "optuna":
            assert order.metric and order.mode
            optuna(space.domains, order.metric, order.mode, settings.seed, [])
            return []
    seeds = [derive(settings.seed, "sweep", number) for number in range(order.samples or 0)]
    return [draw(space.domains, np.random.default_rng(seed)) for seed in seeds]


def _left(sweep: SweepFolder) -> int:
    return len(sweep.waiting()) + len(sweep.further())


def _sync(sweep: SweepFolder) -> str:
    """Return how to send the runs that W&B kept offline, if there are any."""
    runs = sweep.run(0).storage.local
    pattern = f"{sweep.name}-*/wandb/offline-run-*"
    if runs is None or not any(runs.parent.glob(pattern)):
        return ""
    return f"W&B runs are offline; send them with: wandb sync {shlex.quote(str(runs.parent))}/{pattern}"

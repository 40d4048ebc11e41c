"""A sweep: settings and a space → numbered trials on Ray Tune → the table, the plots, the best settings."""

import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.registry import Entry
from raypkg.core.seeds import derive
from raypkg.core.settings import APART
from raypkg.experiments import carry_out, check_names, experiment, settings_of, training_settings_of, with_absolute_path
from raypkg.runs import ROOT
from raypkg.runs import folder as run_folder
from raypkg.runs.show import terminal
from raypkg.runs.storage import Storage

from . import proxy
from .order import EVALUATE, Order, base_of, check_trial, filled, longest_of, trials_of, varied, without
from .show import conclude, show_sweep
from .spaces import Space, check_space, open_space, read_space
from .sweep_folder import DONE, SweepFolder, create_sweep, find_sweep, measured

CHANGEABLE = ("concurrent", "time_budget")  # of a sweep that goes on
WORST = 1e30  # of which schedulers can take means


def start_sweep(
    entry: Entry, order: Order, config: Path | None, values: Mapping[str, Any], name: str | None, root: str
) -> None:
    """Check everything, then run a new sweep; a mistake leaves no folder behind and starts no Ray.

    Raises:
        UserError: bad settings, a bad space, or an order that cannot be carried out.
    """
    schema = settings_of(entry)
    settings = with_absolute_path(load_settings(schema, base_of(schema, config), values))
    check_names(settings)
    space = without(open_space(entry.name if order.space is None else order.space), values)
    order = filled(order, space)
    proxy.check_proxy(order, settings, space)

    def check(values: Mapping[str, Any]) -> None:
        if order.search == "optuna":  # it has yet to think of trials: each value is tried as one, by itself
            check_trial(order, settings, values)
        else:
            check_names(varied(settings, values))

    check_space(space, check)
    trials = trials_of(order, space, settings)
    for number, trial in enumerate(trials):
        try:
            check_trial(order, settings, trial)
        except UserError as error:
            raise UserError(f"trial {number}: {error}") from None
    order = replace(order, samples=len(trials) or order.samples)
    name = f"{entry.name}-{time.strftime('%m%d-%H%M%S')}" if name is None else name
    only = {proxy.ONLY: proxy.coreset_of(root, name)} if order.proxy else {}
    asked = asdict(order) | {"varied": [*space.domains], "fixed": only}
    sweep = create_sweep(root, name, asked, settings, space.text, [trial | only for trial in trials])
    try:
        size = _size(settings, order.concurrent)
    except BaseException:
        sweep.storage.delete_folder("")
        raise
    with sweep.storage.alone(f"sweep {name!r}"):
        _run(entry, sweep, settings, space, size, root)


def resume_sweep(entry: Entry, order: Order, name: str, values: Mapping[str, Any], root: str) -> None:
    """Run the trials of a sweep that are not done; what is done is not run again.

    Args:
        entry: the experiment.
        order: how many trials at once and for how long, where that is to change.
        name: of the sweep.
        values: settings that say where and not what, where they are to change.
        root: of all runs.

    Raises:
        UserError: no such sweep of this experiment, or what would change its results.
    """
    asked = {option: value for option, value in asdict(order).items() if option != "experiment" and value is not None}
    kept = [f"--{option.replace('_', '-')}" for option in asked if option not in CHANGEABLE]
    for option in [*kept, *(setting for setting in values if setting.partition(".")[0] not in APART)]:
        raise UserError(
            f"--resume {name} keeps what was asked for: {option} cannot change, only --concurrent, --time-budget,"
            " cluster.* and track.*"
        )
    sweep = find_sweep(root, name)
    if sweep.order["experiment"] != entry.name:
        raise UserError(f"sweep {name!r} is of {sweep.order['experiment']}, not of {entry.name}")
    settings = load_settings(settings_of(entry), sweep.config, values)
    whole = read_space(sweep.space, f"{sweep.storage.root}/space.py")
    space = without(whole, whole.domains.keys() - sweep.order["varied"])
    with sweep.storage.alone(f"sweep {name!r}"):
        sweep.change(asked, settings)
        if not _left(sweep) and not proxy.enlist(sweep):
            conclude(sweep)
            show_sweep(sweep, terminal())
            return
        _run(entry, sweep, settings, space, _size(settings, sweep.order["concurrent"]), root)


def _size(settings: Any, concurrent: int | None) -> Any:
    """Join or start the cluster, and see how many trials it has room for."""
    from raypkg.cluster.session import connect
    from raypkg.cluster.trials import size_of

    connect(settings.cluster)
    return size_of(settings.cluster, settings.actors, concurrent)


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
            settings = with_absolute_path(
                load_settings(training_settings_of(entry), sweep.config, values | {"cluster.workers": workers})
            )
            if "config.toml" not in run.storage.list():
                run = run_folder.create(sweep.root, entry.name, run.name, settings)

            def listen(row: Mapping[str, Any]) -> None:
                # The last epoch is told of when the run is complete: a trial stopped there would have been for nothing.
                if row.get("main") and row["epoch"] < settings.epochs and row.get(metric) is not None:
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
            proxy.select_proxy(sweep, settings, size.workers, console)
        finals = sweep.finals()  # of a sweep that goes on
        waiting = [trial for trial in sweep.waiting() if trial[0] not in finals]
        interrupted = _attempt(sweep, settings, space, size, waiting, sweep.further(), deadline, console)
        if not interrupted:
            proxy.enlist(sweep)
            waiting = [trial for trial in sweep.waiting() if trial[0] in sweep.finals()]
            interrupted = _attempt(sweep, settings, space, size, waiting, [], deadline, console)
    except (KeyboardInterrupt, SystemExit):  # the latter from Ray Train, around the proxy's selection
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
    from raypkg.cluster.trials import Proposals, Rules, constants, optuna, run_trials

    order, left = sweep.order, deadline - time.monotonic()
    if not (waiting or further) or left <= 0:
        return False
    searcher = None
    if further and order["search"] == "optuna":
        done = [row for row in sweep.results() if row["state"] == DONE and row.get(order["metric"]) is not None]
        told = [(row, row[order["metric"]]) for row in done]
        searcher = optuna(
            space.domains, order["metric"], order["mode"], derive(settings.seed, "sweep", further[0]), told
        )
    finals = not further and {number for number, _ in waiting} <= sweep.finals()
    how = f"{size.workers} workers each, by Ray Train" if size.workers else "one process each"
    what = f"trials of {order['experiment']}{' on all samples' if finals else ''}"
    console.print(f"{sweep.name}: {len(waiting) + len(further)} {what}, {how}, {size.at_once} at once")
    rules = Rules(
        metric=order["metric"],
        mode=order["mode"],
        scheduler="none" if finals else order["scheduler"],
        longest=longest_of(settings, space, [values for _, values in waiting]),
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


def _left(sweep: SweepFolder) -> int:
    return len(sweep.waiting()) + len(sweep.further())


def _sync(sweep: SweepFolder) -> str:
    """Return how to send the runs that W&B kept offline, if there are any."""
    runs = sweep.run(0).storage.local
    pattern = f"{sweep.name}-*/wandb/offline-run-*"
    if runs is None or not any(runs.parent.glob(pattern)):
        return ""
    return f"W&B runs are offline; send them with: wandb sync {shlex.quote(str(runs.parent))}/{pattern}"

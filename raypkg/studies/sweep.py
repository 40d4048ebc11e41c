"""A sweep: settings and a space → numbered trials on Ray Tune → the table, the plots, the best settings."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from raypkg.core.config import check_switches, load_settings, load_stored, with_current_names
from raypkg.core.errors import Interruption, UserError, redacted
from raypkg.core.registry import Entry
from raypkg.core.seeds import derive
from raypkg.core.settings import APART, Experiment
from raypkg.experiments import training_settings_of
from raypkg.experiments.resolve import check_names, with_absolute_paths
from raypkg.experiments.trust import check_code, check_file_of_code
from raypkg.runs.activity import resuming
from raypkg.runs.folder import discard
from raypkg.runs.show import terminal
from raypkg.runs.style import in_full

from .figures import TrialRun
from .order import ALL_TO_THE_END, Order, base_of, check_counts, filled
from .show import conclude, show_sweep, trials_left
from .spaces import Space, check_space, open_space, read_space, space_of, without
from .sweep_folder import DONE, RECORD, SPACE, SweepFolder, create_sweep, find_sweep
from .trial import run_trial
from .trial_settings import Values, check_trial, longest_of, trials_of, varied

if TYPE_CHECKING:  # they import Ray, which a mistake in the settings need not wait for
    from raypkg.cluster.capacity import TrialSize
    from raypkg.cluster.search import Proposals

CHANGEABLE = ("concurrent", "time_budget")  # of a sweep that is resumed


def start_sweep(
    entry: Entry,
    order: Order,
    config: Path | None,
    values: Mapping[str, Any],
    name: str | None,
    root: str,
) -> None:
    """Check everything, then run a new sweep; a mistake leaves no folder behind and starts no Ray.

    Args:
        entry: the experiment.
        order: what was asked for.
        config: a file of settings, or None.
        values: further settings, which win over it.
        name: of the sweep; made up when None.
        root: of all runs.

    Raises:
        UserError: bad settings, a bad space, or an order that cannot be carried out.
    """
    check_root(root)
    schema = training_settings_of(entry)
    settings = with_absolute_paths(load_settings(schema, base_of(schema, config), values))
    check_names(settings)
    whole = space_of(entry.name) if order.space is None else open_space(order.space)
    space = without(whole, values)
    check_switches({**dict.fromkeys(space.domains), **values})  # what is off stays off, whatever a trial draws
    order = filled(order, space)
    trials = _checked_trials(order, settings, space)
    order = replace(order, samples=len(trials) or order.samples)

    if name is None:
        name = f"{entry.name}-{time.strftime('%m%d-%H%M%S')}"
    record = asdict(order) | {"varied": [*space.domains]}
    folder = create_sweep(root, name, record, settings, space.text, trials)
    try:
        sweep = Sweep(folder, settings, space, root)
    except BaseException:  # no cluster, or one too small
        discard(folder.storage)
        raise
    with folder.storage.alone(f"sweep {name!r}"):
        sweep.run()


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
    changes = {option: value for option, value in asdict(order).items() if value is not None}
    del changes["experiment"]
    options = [f"--{option.replace('_', '-')}" for option in changes if option not in CHANGEABLE]
    settled = [setting for setting in values if setting.partition(".")[0] not in APART]
    if refused := next(iter(options + settled), None):
        raise UserError(
            f"--resume {name} keeps what was asked for: {refused} cannot change, only --concurrent, --time-budget,"
            " cluster.* and track.*"
        )
    check_counts(order)
    check_root(root)
    folder = find_sweep(root, name)
    if folder.experiment != entry.name:
        raise UserError(f"sweep {name!r} is of {folder.experiment}, not of {entry.name}")
    if folder.table:
        raise UserError(f"{name!r} is a comparison: continue it with {folder.command} --resume {name}")
    if folder.order.get("scheduler") == "none":
        raise UserError(f"{folder.storage.root}/{RECORD}: scheduler none is now called {ALL_TO_THE_END}")
    check_code(folder.storage, folder.config)
    for trial in folder.trials:
        check_code(folder.storage, trial["settings"], RECORD)
    check_file_of_code(folder.storage, SPACE)
    schema = training_settings_of(entry)
    settings = load_stored(schema, folder.config, values)
    whole = read_space(folder.space, f"{folder.storage.root}/{SPACE}")
    whole = replace(whole, domains=with_current_names(schema, whole.domains))
    space = without(whole, whole.domains.keys() - folder.order["varied"])
    with folder.storage.alone(f"sweep {name!r}"):
        folder.change(changes, settings)
        if trials_left(folder):
            Sweep(folder, settings, space, root).run()
        else:
            conclude(folder)
            show_sweep(folder, terminal())


def check_root(root: str) -> None:
    """Refuse credentials in the root of all runs.

    Raises:
        UserError: it has some.
    """
    if redacted(root) != root:
        raise UserError(
            "--root has credentials in it, which Ray Tune would keep in its own files: leave them to the environment,"
            " such as AWS_ACCESS_KEY_ID"
        )


class Sweep:
    """A sweep that is being run.

    Args:
        folder: of the sweep.
        settings: that all trials share.
        space: that they are drawn from.
        root: of all runs, as the user gave it.
    """

    def __init__(self, folder: SweepFolder, settings: Experiment, space: Space, root: str):
        self.folder = folder
        self.settings = settings
        self.space = space
        self.root = root
        self.size = size_of_trials(settings, folder.order["concurrent"])
        self.console = terminal()
        self.deadline = time.monotonic() + (folder.order["time_budget"] or math.inf)

    def run(self) -> None:
        """Run what is left, then write and show what came of it.

        Raises:
            UserError: the user interrupted.
        """
        try:
            interrupted = self._run_trials()
        except KeyboardInterrupt:
            interrupted = True
        except Interruption as error:
            raise type(error)(f"{error}; resume with: {self._again()}") from error
        finally:
            conclude(self.folder)
        show_sweep(self.folder, self.console)
        left = trials_left(self.folder)
        if interrupted:
            raise Interruption(f"interrupted, {left} trials left; resume with: {self._again()}")
        if left:
            message = f"{left} of {len(self.folder.trials)} trials are not done; resume with: {self._again()}"
            self.console.print(message, soft_wrap=True)
        if self.settings.track.name == "wandb" and (line := _sync(self.folder)):
            self.console.print(line, soft_wrap=True)

    def _run_trials(self) -> bool:
        """Run the trials that are left; return True if the user interrupted."""
        from raypkg.cluster.trials import Rules, run_trials

        sweep = self.folder
        order = sweep.order
        waiting = sweep.waiting()
        further = sweep.further()
        seconds = self.deadline - time.monotonic()
        if not (waiting or further) or seconds <= 0:
            return False
        self._announce(len(waiting) + len(further))
        rules = Rules(
            metric=order["metric"],
            mode=order["mode"],
            scheduler=order["scheduler"],
            longest=longest_of(self.settings, self.space, [values for _, values in waiting]),
            seconds=seconds if math.isfinite(seconds) else None,
            failures=self.settings.cluster.max_failures,
        )
        interrupted = run_trials(
            partial(run_trial, root=sweep.storage.root, workers=self.size.workers),
            self._proposals(waiting, further),
            Progress(sweep, self.console),
            self.size,
            rules,
            folder=(sweep.storage / "ray").uri,
        )
        sweep.storage.delete_folder("ray")
        return interrupted

    def _proposals(self, waiting: Sequence[tuple[int, Values]], further: Sequence[int]) -> Proposals:
        """Return what hands out these trials; Optuna, told of those that are done, thinks of the further ones."""
        from raypkg.cluster.search import Proposals, constants, optuna

        order = self.folder.order
        searcher = None
        if further and order["search"] == "optuna":
            metric = self.folder.metric
            rows = [row for row in self.folder.results() if row["state"] == DONE]
            done = [(row, row[metric]) for row in rows if row.get(metric) is not None]
            seed = derive(self.settings.seed, "sweep", further[0])
            searcher = optuna(self.space.domains, metric, self.folder.mode, seed, done)
        fixed = constants(self.space.domains)
        return Proposals(waiting, searcher, further, fixed)

    def _announce(self, count: int) -> None:
        trials = f"trials of {self.folder.experiment}"
        workers = self.size.workers
        how = f"{workers} workers each, by Ray Train" if workers else "one process each"
        at_once = self.size.at_once
        self.console.print(f"{self.folder.name}: {count} {trials}, {how}, {at_once} at once")

    def _again(self) -> str:
        return resuming(f"effray tune {self.folder.experiment}", self.folder.storage, self.root)


class Progress:
    """Keeps and prints how the trials of a sweep end.

    Args:
        sweep: the folder.
        console: where to print.
        titles: of trials by number, after their names.
    """

    def __init__(self, sweep: SweepFolder, console: Console, titles: Mapping[int, str] | None = None):
        self._sweep = sweep
        self._console = console
        self._titles = titles or {}

    def started(self, number: int, values: Values) -> None:
        """Keep a trial's settings."""
        self._sweep.started(number, values)

    def ended(self, number: int, error: str | None) -> None:
        """Keep and print how it ended."""
        sweep = self._sweep
        state = sweep.ended(number, error)
        run = TrialRun(sweep.run(number))
        reached = run.figures().get(sweep.metric)
        result = error or ("" if reached is None else f"{sweep.metric} {in_full(reached)}")
        title = f" ({self._titles[number]})" if number in self._titles else ""
        self._console.print(f"{sweep.run_name(number)}{title} {state}: {result}", soft_wrap=True)


def _checked_trials(order: Order, settings: Experiment, space: Space) -> list[Values]:
    """Draw the trials that are known beforehand, and refuse a space or a trial that a single run would refuse."""

    def check(values: Values) -> None:
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
    return trials


def size_of_trials(settings: Experiment, concurrent: int | None) -> TrialSize:
    """Join or start the cluster, and choose how a trial runs there and how many do at once."""
    import torch

    from raypkg.cluster.capacity import trial_size
    from raypkg.cluster.session import connect

    processes = (settings.cluster.workers or 1) + settings.actors
    connect(settings.cluster, dashboard=processes > 1 or torch.cuda.is_available())
    return trial_size(settings.cluster, settings.actors, concurrent)


def _sync(sweep: SweepFolder) -> str:
    """Return how to send the runs that W&B kept offline, if there are any."""
    runs = sweep.run_storage(0).local
    pattern = f"{sweep.name}-*/wandb/offline-run-*"
    if runs is None or not any(runs.parent.glob(pattern)):
        return ""
    return f"W&B runs are offline; send them with: wandb sync {shlex.quote(str(runs.parent))}/{pattern}"

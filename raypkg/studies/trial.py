"""One trial of a sweep, in the process that Ray Tune gives it: a run like any other, which tells of its epochs."""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

from rich.console import Console

from raypkg.core.config import load_stored
from raypkg.core.errors import UserError
from raypkg.core.settings import APART, Experiment
from raypkg.experiments import carry_out, experiment, training_settings_of
from raypkg.experiments.resolve import with_absolute_paths, with_tokenizer
from raypkg.experiments.sharing import Donors
from raypkg.runs import folder as run_folder
from raypkg.runs.folder import RunFolder
from raypkg.runs.sealed import CONFIG
from raypkg.runs.stages import Stage
from raypkg.runs.storage import Storage

from .figures import TrialRun
from .order import EVALUATE
from .sweep_folder import AFTER, SweepFolder
from .tables import renamed

WORST = 1e30  # of which schedulers can take means
Row = dict[str, Any]
Tell = Callable[[Row], None]


def run_trial(number: int, values: dict[str, Any], tell: Tell, *, root: str, workers: int) -> Row:
    """Run one trial in its run folder, or resume it there; what is done is only reported.

    A trial that fails reports the worst value there is: schedulers compare it with others.

    Args:
        number: of the trial.
        values: what it sets.
        tell: takes the epoch and the metric while it trains.
        root: of the sweep's folder.
        workers: of the trial; 0 = this process.

    Returns:
        Epoch and metric of its end, and an error if there was one.
    """
    from raypkg.engine.worker import forget_peak_memory

    forget_peak_memory()  # of the trial before, whose process this is
    sweep = SweepFolder(Storage(root))
    try:
        run = sweep.run(number)
        if not run.summary:
            _train(sweep, run, values | {"cluster.workers": workers}, tell, _donors(sweep, number))
        if after := sweep.trials[number].get("after"):
            _follow_up(sweep.run(number), after)
        return _last_row(sweep, number)
    except Exception as error:  # a process that is lost starts again; what a run raises, it would raise again
        return _failure(sweep, number, error)


def _donors(sweep: SweepFolder, number: int) -> Donors | None:
    """Return what gives the finished trials of a comparison that set the same for a phase; None in other sweeps."""
    trials = sweep.trials

    def alike(stage: Stage) -> Iterator[RunFolder]:
        ours = stage.settings_in(trials[number]["settings"])
        for other, trial in enumerate(trials):
            if other != number and stage.settings_in(trial["settings"]) == ours:
                run = sweep.run(other)
                if run.summary:
                    yield run

    return alike if sweep.table else None


def _train(sweep: SweepFolder, run: RunFolder, values: Mapping[str, Any], tell: Tell, donors: Donors | None) -> None:
    """Carry out the run of a trial, whose rows are told of as they come."""
    entry = experiment[sweep.experiment]
    schema = training_settings_of(entry)
    settings = with_tokenizer(with_absolute_paths(load_stored(schema, sweep.config, values)))
    if CONFIG not in run.storage.list():
        run = run_folder.create(sweep.root, entry.name, run.name, settings)
    else:
        _check_is_its_run(run, load_stored(schema, run.config), settings)
    metric = sweep.metric
    last = settings.epochs

    def listen(row: Mapping[str, Any]) -> None:
        # The last epoch is told of when the run is complete: a trial stopped there would have been for nothing.
        if not row.get("main") or row["epoch"] >= last:
            return
        if row.get(metric) is not None:
            run.flush()  # before Tune may stop the trial, whose figures the driver then reads
            tell({"epoch": row["epoch"], metric: row[metric]})

    carry_out(entry, settings, run, Console(quiet=True), group=sweep.name, listen=listen, donors=donors)


def _follow_up(run: RunFolder, after: str) -> None:
    """Call what is to follow a finished run, once, and keep the figures that it returns."""
    if run.storage.read(AFTER) is None:
        figures = imported_function(after)(run)
        run.storage.write_json(AFTER, figures)


def imported_function(name: str) -> Callable[..., Any]:
    """Return a function by its name, ``package.module:function``.

    Raises:
        UserError: there is none.
    """
    module, colon, function = renamed(name).partition(":")
    try:
        found = getattr(import_module(module), function) if colon else None
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"after {name!r} cannot be imported: {error}") from None
    if not callable(found):
        raise UserError(f"after {name!r}: a function is needed, written package.module:function")
    return found


def _check_is_its_run(run: RunFolder, stored: Experiment, settings: Experiment) -> None:
    """Refuse a run that has the trial's name and was not begun by it."""
    as_asked = {"digest": None, "seed": settings.dataset.seed}  # the run has noted what came of them
    theirs = stored.model_copy(update={"dataset": stored.dataset.model_copy(update=as_asked)})
    excluded = set(APART)
    if theirs.model_dump(exclude=excluded) != settings.model_dump(exclude=excluded):
        raise UserError(f"run {run.name!r} has other settings than the trial of that name: rename it, or delete it")


def _last_row(sweep: SweepFolder, number: int) -> Row:
    metric = sweep.metric
    run = TrialRun(sweep.run(number))
    figures = run.figures()
    if metric not in figures:
        raise UserError(f"metric {metric} was not measured in its {run.epochs} epochs: see {EVALUATE}")
    return {"epoch": run.epochs, metric: figures[metric]}


def _failure(sweep: SweepFolder, number: int, error: Exception) -> Row:
    worst = -WORST if sweep.mode == "max" else WORST
    message = str(error)
    if not isinstance(error, UserError):
        message = f"{type(error).__name__}: {message}"
    run = TrialRun(sweep.run(number))
    return {
        "epoch": max(1, run.epochs),
        sweep.metric: worst,
        "error": message.replace("\n", " "),
    }

"""One trial of a study, in the process that Ray Tune gives it or in the caller's: a run that reports its epochs."""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

from rich.console import Console

from raypkg.core.config import load_stored
from raypkg.core.errors import UserError
from raypkg.core.settings import APART
from raypkg.experiments import carry_out, experiment, open_run, training_settings_of
from raypkg.experiments.phases import Donors
from raypkg.experiments.resolve import resolve
from raypkg.runs import folder as run_folder
from raypkg.runs.folder import CONFIG, RunFolder
from raypkg.runs.report import Stage
from raypkg.runs.storage import Storage

from .figures import AFTER, TrialRun
from .space import EVALUATE
from .study import Study, Values

WORST = 1e30  # finite, as schedulers take means
Report = Callable[[dict[str, Any]], None]


def run_trial(number: int, values: Values, report: Report, *, root: str, workers: int) -> dict[str, Any]:
    """Run or resume a trial of the study at ``root``; return its last epoch, the metric, and an error if it failed.

    A failed trial returns the worst metric possible, as schedulers compare it with others. A done one is not run again.
    Without Ray workers it runs in this process.
    """
    from raypkg.engine.worker import forget_peak_memory

    forget_peak_memory()  # of the previous trial in this process
    study = Study(Storage(root))
    metric = study.order.metric
    try:
        if not study.run(number).summary:
            own = {"cluster.workers": workers, "dataset.digest": study.trials[number].digest}
            _train(study, study.run(number), values | own, report, _donors(study, number))
        run = study.run(number)
        after = study.trials[number].after
        if after and run.storage.read(AFTER) is None:
            run.storage.write_json(AFTER, imported_function(after)(run))
        result = TrialRun(run)
        if metric not in result.figures():
            raise UserError(f"metric {metric} was not measured in its {result.epochs} epochs: see {EVALUATE}")
        return {"epoch": result.epochs, metric: result.figures()[metric]}
    except Exception as error:  # no retry, as with a lost process: the run would raise it again
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return {
            "epoch": max(1, TrialRun(study.run(number)).epochs),
            metric: -WORST if study.order.mode == "max" else WORST,
            "error": message.replace("\n", " "),
        }


def _donors(study: Study, number: int) -> Donors | None:
    """Return a function that yields a comparison's finished trials with the same settings of a phase; else None."""
    settings = study.trials[number].settings or {}

    def alike(stage: Stage) -> Iterator[RunFolder]:
        ours = stage.settings_in(settings)
        for other, trial in enumerate(study.trials):
            if other != number and stage.settings_in(trial.settings or {}) == ours:
                run = study.run(other)
                if run.summary:
                    yield run

    return alike if study.order.table else None


def _train(study: Study, run: RunFolder, values: Values, report: Report, donors: Donors | None) -> None:
    """Carry out a trial's run, and report its epochs as they end."""
    entry = experiment[study.experiment]
    schema = training_settings_of(entry)
    base = study.config
    if "preset" in values:  # the values of a row's preset are among them
        base.pop("preset", None)
    settings = resolve(schema, base, values)
    is_new = CONFIG not in run.storage.list()
    if not is_new:
        # A run of the trial's name that somebody else began must not be resumed as the trial. Digest and seed of the
        # data are noted by the run itself, which refuses other samples.
        stored = load_stored(schema, run.config)
        noted = {"digest": stored.dataset.digest, "seed": stored.dataset.seed}
        settings = settings.model_copy(update={"dataset": settings.dataset.model_copy(update=noted)})
    settings, samples = open_run(settings)
    if is_new:
        run = run_folder.create(study.root, entry.name, run.name, settings)
    elif stored.model_dump(exclude=set(APART)) != settings.model_dump(exclude=set(APART)):
        raise UserError(f"run {run.name!r} has other settings than the trial of that name: rename it, or delete it")
    metric = study.order.metric

    def listen(row: Mapping[str, Any]) -> None:
        # The last epoch is reported when the run is complete: a trial that is stopped there would be wasted.
        if not row.get("main") or row["epoch"] >= settings.epochs:
            return
        if row.get(metric) is not None:
            run.flush()  # Tune may stop the trial here, and its driver reads the figures then
            report({"epoch": row["epoch"], metric: row[metric]})

    carry_out(entry, settings, samples, run, Console(quiet=True), group=study.name, listen=listen, donors=donors)


def imported_function(name: str) -> Callable[..., Any]:
    """Import the function ``package.module:function``."""
    module, colon, function = name.partition(":")
    try:
        found = getattr(import_module(module), function) if colon else None
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"after {name!r} cannot be imported: {error}") from None
    if not callable(found):
        raise UserError(f"after {name!r}: a function is needed, written package.module:function")
    return found

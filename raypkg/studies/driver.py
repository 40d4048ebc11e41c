"""Running the trials of a study that are left, in the processes that Ray Tune gives them or in this one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from rich.console import Console

from raypkg.core.config import load_settings, load_stored
from raypkg.core.errors import Interruption, UserError
from raypkg.core.registry import imported
from raypkg.core.seeds import derive
from raypkg.core.settings import APART, Experiment
from raypkg.experiments import carry_out, experiment, open_run, training_settings_of
from raypkg.experiments.phases import stages_of
from raypkg.experiments.resolve import resolve
from raypkg.runs import folder as run_folder
from raypkg.runs.catalog import resuming
from raypkg.runs.document import terminal
from raypkg.runs.folder import CONFIG, RunFolder
from raypkg.runs.plots import in_full
from raypkg.runs.report import Stage
from raypkg.runs.storage import Storage

from .outcomes import Outcomes
from .show import conclude, show_study
from .study import AFTER, DONE, Study, TrialRun, Values
from .tables import Table

if TYPE_CHECKING:  # it imports Ray, which a mistake in the settings need not wait for
    from raypkg.cluster.session import Plan

Trials = Sequence[tuple[int, Values]]  # numbers and settings
EVALUATE = "train.evaluate_every_epochs"  # 1 unless given: schedulers compare trials epoch by epoch
E = TypeVar("E", bound=Experiment)
WORST = 1e30  # finite, as schedulers take means
RowListener = Callable[[dict[str, Any]], None]


class Driver:
    """Runs the trials of a study that are left, in a folder that the caller has locked; refuses those that cannot fit.

    A comparison has the table of this call, with its rows, cases and seeds. A sweep has the domains of its space, from
    which a searcher draws. A new study whose trials cannot start is deleted.
    """

    def __init__(
        self,
        study: Study,
        settings: Experiment,
        root: str,
        table: Table | None = None,
        domains: Mapping[str, Any] | None = None,
        *,
        is_new: bool = False,
    ):
        self.study = study
        self.settings = settings
        self.table = table
        self.domains = domains or {}
        self.console = terminal()
        self.again = resuming(study.command, study.storage, root)
        # A trial may stand for several rows, and calls differ in their rows and seeds: titles name those of this one.
        self.titles: dict[int, str] = {}
        if table:
            numbers = study.numbers()
            for case, row, seed, rate in table.places():
                number = numbers.get(table.identity(case, row, seed, rate))
                if number is not None:
                    place = f"{row}; {case}" if len(table.cases) > 1 else row
                    place += f"; rate {rate:g}" if rate else ""
                    self.titles.setdefault(number, f"{place}; seed {seed}")
        self.size: Plan | None = None  # None: the trials run in this process, one after another
        if (not table or settings.cluster.workers != 0) and self.left():
            import torch

            from raypkg.cluster.session import connect, trial_size

            workers = settings.cluster.workers or 1
            try:
                connect(settings.cluster, dashboard=workers > 1 or torch.cuda.is_available())
                self.size = trial_size(settings.cluster, study.order.concurrent)
            except BaseException:  # no cluster, or one too small
                if is_new:
                    study.storage.delete_folder()
                raise

    def waiting(self) -> Trials:
        """Return the trials of this call that are to be run and whose settings are known."""
        waiting = dict(self.study.waiting())
        ours = self.titles if self.table else waiting
        return [(number, waiting[number]) for number in ours if number in waiting]

    def left(self) -> int:
        """Return the number of trials still to run in this call."""
        return len(self.waiting()) + len(self.study.further())

    def run(self) -> list[str]:
        """Run the trials that are left, then write and show the results; return the verdicts of a comparison."""
        interrupted = False
        try:
            interrupted = self._run_trials()
        except KeyboardInterrupt:
            interrupted = True
        except Interruption as error:
            raise type(error)(f"{error}; resume with: {self.again}") from error
        finally:
            conclude(self.study)
        show_study(self.study, self.table)
        left = self.left()
        if interrupted:
            raise Interruption(f"interrupted, {left} trials left; resume with: {self.again}")
        if left:
            count = len(self.titles) or len(self.study.trials)
            line = f"{left} of {count} trials are not done; resume with: {self.again}"
            self.console.print(line, soft_wrap=True)
        runs = self.study.run_storage(0).local
        pattern = f"{self.study.name}-*/wandb/offline-run-*"
        if self.settings.track.name == "wandb" and runs is not None and any(runs.parent.glob(pattern)):
            line = f"W&B runs are offline; send them with: wandb sync {shlex.quote(str(runs.parent))}/{pattern}"
            self.console.print(line, soft_wrap=True)
        return [found["verdict"] for found in Outcomes(self.study, self.table).verdicts()] if self.table else []

    def ended(self, number: int, error: str | None) -> None:
        """Record and print how a trial ended."""
        study = self.study
        state = study.ended(number, error)
        reached = TrialRun(study.run(number)).figures().get(study.order.metric)
        result = study.trials[number].error or ("" if reached is None else f"{study.order.metric} {in_full(reached)}")
        title = f" ({self.titles[number]})" if number in self.titles else ""
        self.console.print(f"{study.run_name(number)}{title} {state}: {result}", soft_wrap=True)

    def _run_trials(self) -> bool:
        """Run the trials, on Ray or one after another in this process; return True if the user interrupted."""
        study = self.study
        study.settle()
        waiting = self.waiting()
        further = study.further()
        count = len(waiting) + len(further)
        done = len(self.titles or study.trials) - len(waiting)
        line = f"{study.name}: {count} trials of {study.experiment} to run, {done} done"
        if self.size:
            workers = self.size.of_a_trial
            each = f"{workers} workers each, by Ray Train" if workers else "one process each"
            line += f"; {each}, {self.size.at_once} at once"
        self.console.print(line)
        if not count:
            return False
        if self.size is None:
            for number, values in waiting:
                study.started(number, values)
                last = run_trial(number, values, lambda row: None, root=study.storage.root, workers=0)
                self.ended(number, last.get("error"))
            return False

        from raypkg.cluster.trials import SCHEDULERS, Proposals, constants, optuna, run_trials

        order = study.order
        if self.table:
            proposals = Proposals(donors_first(waiting, stages_of(study.experiment, self.settings)))
        else:  # Optuna learns from done trials, and proposes those without settings
            searcher = None
            if further and order.search == "optuna":
                rows = [row for row in study.results(study.runs()) if row["state"] == DONE]
                measured = [(row, row[order.metric]) for row in rows if row.get(order.metric) is not None]
                seed = derive(self.settings.seed, "sweep", further[0])
                searcher = optuna(self.domains, order.metric, order.mode, seed, measured)
            proposals = Proposals(waiting, searcher, further, constants(self.domains))
        longest = longest_of(self.settings, self.domains, [values for _, values in waiting])
        interrupted = run_trials(
            partial(run_trial, root=study.storage.root, workers=self.size.of_a_trial),
            proposals,
            self.size,
            started=study.started,
            ended=self.ended,
            metric=order.metric,
            mode=order.mode,
            scheduler=SCHEDULERS[order.scheduler](longest),
            seconds=order.time_budget,
            failures=self.settings.cluster.max_failures,
            folder=(study.storage / "ray").uri,
        )
        study.storage.delete_folder("ray")
        return interrupted


def varied(base: E, values: Mapping[str, Any]) -> E:
    """Return the shared settings with those of a trial; raise ``UserError`` if one is unknown or invalid."""
    return load_settings(type(base), base.model_dump(mode="json"), values)


def donors_first(trials: Trials, stages: Sequence[Stage]) -> Trials:
    """Put, within each seed, one trial of those that share a first phase before the others, which then take it over."""
    shared = next((stage for stage in stages if stage.depends_on), None)
    if shared is None:
        return trials
    first: dict[str, int] = {}  # number of the first trial of each group
    for number, values in trials:
        group = json.dumps(shared.settings_in(values), sort_keys=True)
        first.setdefault(group, number)
    donors = set(first.values())
    seeds = list(dict.fromkeys(values["seed"] for _, values in trials))
    return sorted(trials, key=lambda trial: (seeds.index(trial[1]["seed"]), trial[0] not in donors))


def longest_of(settings: Experiment, domains: Mapping[str, Any], known: Sequence[Values]) -> int:
    """Return the epochs of the longest trial, among the known ones and those that the domains allow."""
    from raypkg.cluster.trials import candidates, draw_settings

    def epochs(values: Values) -> int:
        return varied(settings, values).epochs

    # A value alone may be invalid without others that accompany it, such as crest.h without crest.tau, so start from
    # a whole trial; a known one has been checked.
    drawn = draw_settings(domains, np.random.default_rng(settings.seed))
    longest = {**drawn, **(known[0] if known else {})}
    for name, domain in domains.items():
        values = candidates(domain)
        if values:
            longest[name] = max(values, key=lambda value: epochs({**longest, name: value}))
    return max(epochs(values) for values in (longest, *known))


# One trial


def run_trial(number: int, values: Values, report: RowListener, *, root: str, workers: int) -> dict[str, Any]:
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
            _train(study, number, values | own, report)
        run = study.run(number)
        after = study.trials[number].after
        if after and run.storage.read(AFTER) is None:
            run.storage.write_json(AFTER, imported("after function", after)(run))
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


def _train(study: Study, number: int, values: Values, report: RowListener) -> None:
    """Carry out a trial's run, and report its epochs as they end; it may take phases of a comparison's others over."""
    run = study.run(number)
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

    def donors(stage: Stage) -> Iterator[RunFolder]:
        known = dict(study.known())
        ours = stage.settings_in(known.pop(number, {}))
        for other, theirs in known.items():
            if stage.settings_in(theirs) == ours and (donor := study.run(other)).summary:
                yield donor

    quiet = Console(quiet=True)
    others = donors if study.order.table else None
    carry_out(entry, settings, samples, run, quiet, group=study.name, listen=listen, donors=others)

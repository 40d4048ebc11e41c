"""The driver of a study: runs the trials that are left, then writes and shows the results."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from raypkg.core.errors import Interruption, UserError, redacted
from raypkg.core.seeds import derive
from raypkg.core.settings import Experiment
from raypkg.experiments.phases import stages_of
from raypkg.runs.catalog import resuming
from raypkg.runs.plots import in_full
from raypkg.runs.report import Stage
from raypkg.runs.show import terminal

from .figures import DONE, TrialRun
from .show import conclude, show_study
from .space import longest_of
from .study import Study, Values
from .tables import Table
from .trial import run_trial

if TYPE_CHECKING:  # they import Ray, which a mistake in the settings need not wait for
    from raypkg.cluster.capacity import TrialSize
    from raypkg.cluster.search import Proposals

Trials = Sequence[tuple[int, Values]]  # numbers and settings


class Driver:
    """Runs the trials of a study that are left, in a folder that the caller has locked; refuses those that cannot fit.

    A searcher draws from ``domains``, those of a sweep's space. A comparison has none, but a table with the rows, cases
    and seeds of this call.
    """

    def __init__(
        self,
        study: Study,
        settings: Experiment,
        root: str,
        domains: Mapping[str, Any] | None = None,
        table: Table | None = None,
    ):
        self.study = study
        self.settings = settings
        self.domains = domains or {}
        self.table = table
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
        self.size: TrialSize | None = None  # None: the trials run in this process, one after another
        if (not table or settings.cluster.workers != 0) and self.left():
            import torch

            from raypkg.cluster.capacity import trial_size
            from raypkg.cluster.session import connect

            workers = settings.cluster.workers or 1
            connect(settings.cluster, dashboard=workers > 1 or torch.cuda.is_available())
            self.size = trial_size(settings.cluster, study.order.concurrent)

    def waiting(self) -> Trials:
        """Return the trials of this call that are to be run and whose settings are known."""
        waiting = self.study.waiting()
        if self.table is None:
            return waiting
        settings = dict(waiting)
        return [(number, settings[number]) for number in self.titles if number in settings]

    def left(self) -> int:
        """Return the number of trials still to run in this call."""
        return len(self.waiting()) + len(self.study.further())

    def run(self) -> None:
        """Run the trials that are left, then write and show the results."""
        interrupted = False
        try:
            interrupted = self._run_trials()
        except KeyboardInterrupt:
            interrupted = True
        except Interruption as error:
            raise type(error)(f"{error}; resume with: {self.again}") from error
        finally:
            conclude(self.study)
        show_study(self.study, self.console, self.table)
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
            workers = self.size.workers
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

        from raypkg.cluster.trials import SCHEDULERS, run_trials

        order = study.order
        longest = longest_of(self.settings, self.domains, [values for _, values in waiting])
        interrupted = run_trials(
            partial(run_trial, root=study.storage.root, workers=self.size.workers),
            self._proposals(waiting, further),
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

    def _proposals(self, waiting: Trials, further: Sequence[int]) -> Proposals:
        """Return the trials in the order in which they start; Optuna learns from done ones and proposes the rest."""
        from raypkg.cluster.search import Proposals, constants, optuna

        study = self.study
        if self.table:
            return Proposals(donors_first(waiting, stages_of(study.experiment, self.settings)))
        searcher = None
        if further and study.order.search == "optuna":
            metric, mode = study.order.metric, study.order.mode
            rows = [row for row in study.results(study.runs()) if row["state"] == DONE]
            done = [(row, row[metric]) for row in rows if row.get(metric) is not None]
            seed = derive(self.settings.seed, "sweep", further[0])
            searcher = optuna(self.domains, metric, mode, seed, done)
        return Proposals(waiting, searcher, further, constants(self.domains))


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


def check_root(root: str) -> None:
    """Refuse credentials in the root of all runs."""
    if redacted(root) != root:
        advice = "leave them to the environment, such as AWS_ACCESS_KEY_ID"
        raise UserError(f"--root has credentials in it, which Ray Tune would keep in its own files: {advice}")

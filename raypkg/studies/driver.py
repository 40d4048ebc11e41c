"""Running a study: checks beforehand, the driver that runs the trials that are left, and one trial.

A trial runs in the process that Ray Tune gives it, or in the driver's.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from rich.console import Console

from raypkg.core.config import Settings, leaves, load_settings, load_stored, read_toml
from raypkg.core.errors import Interruption, UserError, redacted, shown
from raypkg.core.registry import imported
from raypkg.core.seeds import derive
from raypkg.core.settings import APART, Dataset, Experiment, RunSettings, Training
from raypkg.experiments import carry_out, experiment, open_run, training_settings_of
from raypkg.experiments.phases import Donors, stages_of
from raypkg.experiments.resolve import check_code, check_names, resolve
from raypkg.experiments.samples import Samples
from raypkg.runs import folder as run_folder
from raypkg.runs.catalog import resuming
from raypkg.runs.folder import CONFIG, RunFolder, read_settings
from raypkg.runs.plots import in_full
from raypkg.runs.report import Stage
from raypkg.runs.show import terminal
from raypkg.runs.storage import Storage

from .figures import AFTER, DONE, TrialRun
from .show import conclude, show_study
from .study import RECORD, Study, Values, find_study
from .tables import METRICS, Table

if TYPE_CHECKING:  # they import Ray, which a mistake in the settings need not wait for
    from raypkg.cluster.capacity import TrialSize
    from raypkg.cluster.search import Proposals

Trials = Sequence[tuple[int, Values]]  # numbers and settings
MOST = 10_000  # trials of a study, and values of a setting: each is checked beforehand
EVALUATE = "train.evaluate_every_epochs"  # 1 unless given: schedulers compare trials epoch by epoch
E = TypeVar("E", bound=Experiment)
WORST = 1e30  # finite, as schedulers take means
RowListener = Callable[[dict[str, Any]], None]


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


def reopened(root: str, name: str) -> Study:
    """Open an existing study to run its trials; refuse code in its record that is not trusted."""
    check_root(root)
    study = find_study(root, name)
    check_code(study.storage, study.config)
    for trial in study.trials:
        check_code(study.storage, trial.settings, RECORD)
        check_code(study.storage, {"after": trial.after or ""}, RECORD)
    return study


def check_root(root: str) -> None:
    """Refuse credentials in the root of all runs."""
    if redacted(root) != root:
        advice = "leave them to the environment, such as AWS_ACCESS_KEY_ID"
        raise UserError(f"--root has credentials in it, which Ray Tune would keep in its own files: {advice}")


# Checks before the first trial starts


def base_of(schema: type[Settings], config: Path | None) -> dict[str, Any]:
    """Return the settings in a file, with an evaluation after every epoch unless it says otherwise."""
    base = read_toml(config) if config else {}
    train = base.get("train", {})
    if EVALUATE in dict(leaves(schema)) and isinstance(train, dict):
        base["train"] = {"evaluate_every_epochs": 1, **train}
    return base


def check_counts(asked: Mapping[str, Any]) -> None:
    """Refuse too few or too many trials, in all or at once."""
    for option in ("samples", "concurrent"):
        count = asked.get(option)
        if count is not None and not 1 <= count <= MOST:
            raise UserError(f"--{option} {shown(count)}: at least 1 and at most {MOST:,}")


def varied(base: E, values: Mapping[str, Any]) -> E:
    """Return the shared settings with those of a trial; raise ``UserError`` if one is unknown or invalid."""
    return load_settings(type(base), base.model_dump(mode="json"), values)


def check_trial(metric: str, base: Experiment, values: Values) -> int:
    """Refuse settings of a trial that a single run would refuse, or with which no epoch would have the metric.

    Return the number of its training samples.
    """
    from raypkg.experiments.coreset_files import load_coreset

    trial = varied(base, values)
    check_names(trial)
    if METRICS[metric].held_out:
        if not trial.dataset.validation:
            raise UserError(f"metric {metric} is measured on held-out samples: dataset.validation = 0 holds out none")
        train: Training = trial.train  # type: ignore[attr-defined]  # every experiment declares its own
        every = train.evaluate_every_epochs
        if not 0 < every <= trial.epochs:
            raise UserError(f"metric {metric} would never be measured: {EVALUATE} = {every} of {trial.epochs} epochs")
    samples = samples_of(trial)
    n = len(samples.train_indices)
    given = getattr(trial, "coreset", None)
    if given is not None:
        n = len(load_coreset(given, samples, trial.dataset))
    trial.check(n, samples.data)
    return n


def samples_of(settings: Experiment) -> Samples:
    """Return the samples of a trial; the last ones stay open."""
    return _opened(json.dumps(settings.dataset.model_dump(mode="json")), settings.seed)


def data_digests(base: Experiment, trials: Iterable[Values]) -> Iterator[str]:
    """Yield the digest of each trial's samples; a data set is opened once, or once for each seed that draws in it."""
    known: dict[tuple[str, int | None], str] = {}
    for values in trials:
        trial = varied(base, values)
        dataset = json.dumps(trial.dataset.model_dump(mode="json", exclude={"digest"}))
        key = dataset, trial.seed if trial.dataset.is_drawn else None
        if key not in known:
            known[key] = _opened(dataset, trial.seed).digest(trial.dataset)
        yield known[key]


def check_data(study: Study, settings: Experiment) -> None:
    """Refuse to continue a study of other data, by the digests in the record or else in the runs of its trials."""
    known = study.known()
    digests = data_digests(settings, (values for _, values in known))
    for (number, _), digest in zip(known, digests, strict=True):
        run = study.run_storage(number)
        stored = study.trials[number].digest or (
            CONFIG in run.list() and read_settings(run).get("dataset", {}).get("digest")
        )
        if stored and stored != digest:
            problem = f"the data of {study.run_name(number)} are not those that it began with"
            raise UserError(f"{problem}: give another --name, or delete {study.name!r} and its trials")


@lru_cache(maxsize=2)
def _opened(dataset: str, seed: int) -> Samples:
    """Open the samples of trials, which mostly share them."""
    from raypkg.experiments.samples import open_samples

    return open_samples(RunSettings(seed=seed, dataset=Dataset.model_validate_json(dataset)))


def longest_of(settings: Experiment, domains: Mapping[str, Any], known: Sequence[Values]) -> int:
    """Return the epochs of the longest trial, among the known ones and those that the domains allow."""
    from raypkg.cluster.search import candidates, draw_settings

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
            _train(study, study.run(number), values | own, report, _donors(study, number))
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


def _train(study: Study, run: RunFolder, values: Values, report: RowListener, donors: Donors | None) -> None:
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

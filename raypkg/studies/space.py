"""Tune spaces, the requests that fill them with trials, and the settings of a trial."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from raypkg.cluster.session import prepare
from raypkg.core.config import Settings, first_problem, leaves, load_settings, read_toml
from raypkg.core.errors import UserError, shown, unknown
from raypkg.core.seeds import derive
from raypkg.core.settings import APART, Dataset, Experiment, RunSettings, Training
from raypkg.experiments.resolve import check_names
from raypkg.experiments.samples import Samples
from raypkg.runs.folder import CONFIG, read_settings

from .study import TO_THE_END, Order, Study, Values
from .tables import METRICS, read_code, run_code, shipped_files

SPACES = "tune_spaces"
SAMPLES = 8  # trials
MOST = 10_000  # trials of a study, and values of a setting: each is checked beforehand
DRAWS = 1000  # attempts to draw settings that no other trial has
NAMES = {
    "mode": ("max", "min"),
    "scheduler": ("asha", "hyperband", "median", TO_THE_END),
    "search": ("random", "grid", "optuna"),
}
EVALUATE = "train.evaluate_every_epochs"  # 1 unless given: schedulers compare trials epoch by epoch
E = TypeVar("E", bound=Experiment)


class Space(BaseModel):
    """Domains to draw settings from, and the metric to optimise."""

    text: str  # content of the file
    domains: dict[str, Any]  # Ray Tune's domains, or plain values, by dotted names of settings
    metric: str
    mode: str  # max or min


def space_of(experiment: str) -> Space:
    """Return the space with an experiment's name, or that of plain training."""
    return open_space(experiment if experiment in shipped_files(SPACES) else "train")


def open_space(name: str) -> Space:
    """Read a space by its name in ``tune_spaces`` or its path; a file of the working folder wins."""
    return read_space(*read_code("space", name, SPACES))


def read_space(text: str, origin: str) -> Space:
    """Run a space's file; refuse one that raises, that lacks a name, or from which nothing can be drawn."""
    prepare()  # before a space, or the next line, imports Ray Tune
    from raypkg.cluster.search import candidates, draw_settings

    needed = {name: name for name in ("space", "METRIC", "MODE")}
    content, metric, mode = run_code("space", text, origin, needed)
    try:
        space = Space(text=text, domains=content, metric=metric, mode=mode)
    except ValidationError as error:
        raise UserError(f"space {origin!r}: {first_problem(error)}") from None
    for name, domain in space.domains.items():
        try:
            json.dumps([draw_settings({name: domain}, np.random.default_rng(0)), candidates(domain)])
        except (Exception, SystemExit) as error:  # a domain may hold the user's code
            raise UserError(f"space {origin!r}: nothing can be drawn for {name}: {error}") from None
    return space


def without(space: Space, given: Iterable[str]) -> Space:
    """Return a space without the given settings (``model`` = ``model.name``); raise ``UserError`` if none is left."""
    fixed = {name.removesuffix(".name") for name in given}
    domains = {name: domain for name, domain in space.domains.items() if name.removesuffix(".name") not in fixed}
    if space.domains and not domains:
        raise UserError(f"nothing is left to vary: {', '.join(space.domains)} are given")
    return space.model_copy(update={"domains": domains})


def check_space(space: Space, check: Callable[[Values], None]) -> None:
    """Refuse a space with an unknown setting, with a value that its setting does not allow, or of one point.

    Each choice and both ends of each range are checked, with the first values of the other settings.
    """
    from raypkg.cluster.search import candidates, constants

    choices = {name: candidates(domain) for name, domain in space.domains.items()}
    first = {name: values[0] for name, values in choices.items() if values}
    for name, values in choices.items():
        if name == "preset":  # its values would be those of the shared settings
            raise UserError("space: preset cannot be varied: vary the settings that it stands for, or compare presets")
        if name.partition(".")[0] in APART:
            raise UserError(f"space: {name} does not alter the result and cannot be varied; give it as an option")
        if len(values) > MOST:
            raise UserError(f"space: {name} has {len(values):,} values, of which {MOST:,} can be tried")
        for value in values:
            try:
                check({**first, name: value})
            except UserError as error:
                raise UserError(f"space: {error}") from None
    if len(constants(space.domains)) == len(space.domains):
        raise UserError(f"space: there is nothing to vary, only {space.domains}")


# The request


def order_of(experiment: str, asked: Mapping[str, Any], space: Space) -> Order:
    """Return a request, its omitted options set to defaults; raise ``UserError`` if it cannot be carried out."""
    chosen = {"metric": space.metric, "scheduler": "asha", "search": "random", "samples": SAMPLES, **asked}
    metric, scheduler = chosen["metric"], chosen["scheduler"]
    if scheduler == "none":
        raise UserError(f"scheduler none is now called {TO_THE_END}")
    if metric in METRICS:
        chosen.setdefault("mode", space.mode if metric == space.metric else METRICS[metric].mode)
    for option, allowed in {"metric": METRICS, **NAMES}.items():
        if chosen[option] not in allowed:
            raise unknown(option, chosen[option], allowed)
    if scheduler != TO_THE_END and not METRICS[metric].each_epoch:
        problem = f"metric {metric} is known only at the end of a trial, so --scheduler {scheduler} could not act on it"
        raise UserError(f"{problem}: give --scheduler {TO_THE_END}, or --metric accuracy")
    check_counts(asked)
    if chosen["search"] == "grid" and "samples" in asked:
        raise UserError(f"--samples {asked['samples']}: a grid has as many trials as combinations")
    return Order(experiment=experiment, varied=[*space.domains], **chosen)


def check_counts(asked: Mapping[str, Any]) -> None:
    """Refuse too few or too many trials, in all or at once."""
    for option in ("samples", "concurrent"):
        count = asked.get(option)
        if count is not None and not 1 <= count <= MOST:
            raise UserError(f"--{option} {shown(count)}: at least 1 and at most {MOST:,}")


def base_of(schema: type[Settings], config: Path | None) -> dict[str, Any]:
    """Return the settings in a file, with an evaluation after every epoch unless it says otherwise."""
    base = read_toml(config) if config else {}
    train = base.get("train", {})
    if EVALUATE in dict(leaves(schema)) and isinstance(train, dict):
        base["train"] = {"evaluate_every_epochs": 1, **train}
    return base


# Trials


def trials_of(order: Order, space: Space, settings: Experiment) -> list[Values]:
    """Draw distinct settings of the trials that are known beforehand; a small space may have fewer."""
    from raypkg.cluster.search import draw_settings, grid, optuna

    if order.search == "grid":
        return list(grid(space.domains))
    if order.search == "optuna":  # it proposes a trial when one starts; the call shows whether it can
        optuna(space.domains, order.metric, order.mode, settings.seed, [])
        return []
    trials: list[Values] = []
    for number in range(order.samples):
        rng = np.random.default_rng(derive(settings.seed, "sweep", number))
        draws = (draw_settings(space.domains, rng) for _ in range(DRAWS))
        new = next((values for values in draws if values not in trials), None)
        if new is None:
            break
        trials.append(new)
    return trials


def varied(base: E, values: Mapping[str, Any]) -> E:
    """Return the shared settings with those of a trial; raise ``UserError`` if one is unknown or invalid."""
    return load_settings(type(base), base.model_dump(mode="json"), values)


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

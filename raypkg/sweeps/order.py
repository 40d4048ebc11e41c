"""What a sweep is asked for: filled in, and refused where it cannot be carried out, before anything starts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from raypkg.core.config import Settings, leaves, load_settings, read_toml
from raypkg.core.errors import UserError, unknown
from raypkg.core.seeds import derive
from raypkg.core.settings import Dataset, RunSettings
from raypkg.experiments import check_names

from .spaces import Space
from .sweep_folder import METRICS

SAMPLES = 8
DRAWS = 1000  # in search of settings that no trial has
EVALUATE = "train.evaluate_every_epochs"  # 1 in a sweep, unless given: schedulers compare trials epoch by epoch


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


def filled(order: Order, space: Space) -> Order:
    """Return the order with nothing left out.

    Raises:
        UserError: it cannot be carried out.
    """
    metric = space.metric if order.metric is None else order.metric
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
    for option, value in (("samples", order.samples), ("concurrent", order.concurrent)):
        if value is not None and value < 1:
            raise UserError(f"--{option} {value}: at least 1")
    if search == "grid" and order.samples is not None:
        raise UserError(f"--samples {order.samples}: a grid has as many trials as combinations")
    return replace(
        order,
        samples=SAMPLES if order.samples is None else order.samples,
        metric=metric,
        mode=mode,
        scheduler=scheduler,
        search=search,
        proxy_method="gradmatch" if order.proxy is not None and order.proxy_method is None else order.proxy_method,
    )


def base_of(schema: type[Settings], config: Path | None) -> dict[str, Any]:
    """Return what the file sets, and a look at the held-out samples after every epoch unless it says otherwise."""
    base = read_toml(config) if config else {}
    train = base.get("train", {})
    if EVALUATE in dict(leaves(schema)) and isinstance(train, dict):
        base["train"] = {"evaluate_every_epochs": 1, **train}
    return base


def without(space: Space, given: Iterable[str]) -> Space:
    """Return the space without the settings that the user gave; ``model`` and ``model.name`` are the same.

    Raises:
        UserError: nothing is left.
    """
    fixed = {name.removesuffix(".name") for name in given}
    domains = {name: domain for name, domain in space.domains.items() if name.removesuffix(".name") not in fixed}
    if space.domains and not domains:
        raise UserError(f"nothing is left to vary: {', '.join(space.domains)} are given")
    return Space(space.text, domains, space.metric, space.mode)


def trials_of(order: Order, space: Space, settings: Any) -> list[dict[str, Any]]:
    """Return what each trial sets, as far as it is known beforehand, no two the same: of a small space all there is.

    Raises:
        UserError: a grid over a range, or a searcher that is not installed.
    """
    import numpy as np

    from raypkg.cluster.trials import draw_settings, grid, optuna

    match order.search:
        case "grid":
            return list(grid(space.domains))
        case "optuna":
            assert order.metric and order.mode
            optuna(space.domains, order.metric, order.mode, settings.seed, [])
            return []
    drawn: list[dict[str, Any]] = []
    for number in range(order.samples or 0):
        rng = np.random.default_rng(derive(settings.seed, "sweep", number))
        new = (trial for trial in (draw_settings(space.domains, rng) for _ in range(DRAWS)) if trial not in drawn)
        drawn += islice(new, 1)
    return drawn


def varied(base: Any, values: Mapping[str, Any]) -> Any:
    """Return the settings that all trials share with what one of them sets.

    Raises:
        UserError: an unknown setting, or a value that it does not allow.
    """
    return load_settings(type(base), base.model_dump(mode="json"), values)


def longest_of(settings: Any, space: Space, known: Iterable[Mapping[str, Any]]) -> int:
    """Return the epochs of the longest trial, of those that are known and those that the space allows."""
    from raypkg.cluster.trials import candidates

    def epochs(values: Mapping[str, Any]) -> int:
        return varied(settings, values).epochs

    tried = {name: [(epochs({name: value}), value) for value in candidates(d)] for name, d in space.domains.items()}
    longest = {name: max(values, key=itemgetter(0))[1] for name, values in tried.items() if values}
    return max(epochs(values) for values in (longest, *known))


def check_trial(order: Order, base: Any, values: Mapping[str, Any]) -> None:
    """Refuse settings of a trial that a single run, on all samples or on the proxy's, would refuse, or not measure.

    Raises:
        UserError: what is wrong.
    """
    trial = varied(base, values)
    check_names(trial)
    _check_measured(order, trial)
    n = samples_of(trial)
    trial.check(n)
    if order.proxy:
        trial.check(max(1, round(order.proxy * n)))


def samples_of(trial: Any) -> int:
    """Return how many samples a trial trains on."""
    return _count(trial.dataset.model_dump_json(), trial.seed, getattr(trial, "coreset", None))


@lru_cache
def _count(dataset: str, seed: int, coreset: str | None) -> int:
    from raypkg.phases.coreset_files import load_coreset
    from raypkg.phases.samples import open_samples

    chosen = Dataset.model_validate_json(dataset)
    samples = open_samples(RunSettings(seed=seed, dataset=chosen))
    if coreset is None:
        return len(samples.kept)
    return len(load_coreset(coreset, samples.data.train, samples.valid, chosen.name))


def _check_measured(order: Order, trial: Any) -> None:
    assert order.metric
    if not METRICS[order.metric].held_out:
        return
    if not trial.dataset.validation:
        raise UserError(f"metric {order.metric} is measured on held-out samples: dataset.validation = 0 holds out none")
    if not 0 < trial.train.evaluate_every_epochs <= trial.epochs:
        raise UserError(
            f"metric {order.metric} would never be measured: {EVALUATE} = {trial.train.evaluate_every_epochs} of"
            f" {trial.epochs} epochs"
        )

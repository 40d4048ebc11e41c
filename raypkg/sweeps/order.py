"""What a sweep is asked for: filled in, and refused where it cannot be carried out, before anything starts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from raypkg.core.config import Settings, leaves, load, read_toml
from raypkg.core.errors import UserError, unknown
from raypkg.core.seeds import derive
from raypkg.experiments import check_names
from raypkg.runs.sweep import METRICS

from .spaces import Space

SAMPLES = 8
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


def filled(order: Order, space: Space, settings: Any) -> Order:
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


def base_of(schema: type[Settings], config: Path | None) -> dict[str, Any]:
    """Return what the file sets, and a look at the held-out samples after every epoch unless it says otherwise."""
    base = read_toml(config) if config else {}
    train = base.get("train", {})
    if EVALUATE in dict(leaves(schema)) and isinstance(train, dict):
        base["train"] = {"evaluate_every": 1, **train}
    return base


def without(space: Space, given: Iterable[str]) -> Space:
    """Return the space without the settings that the user gave."""
    domains = {name: domain for name, domain in space.domains.items() if name not in {*given}}
    if not domains:
        raise UserError(f"nothing is left to vary: {', '.join(space.domains)} are given")
    return Space(space.text, domains, space.metric, space.mode)


def trials_of(order: Order, space: Space, settings: Any) -> list[dict[str, Any]]:
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


def longest_of(settings: Any, space: Space, known: Iterable[Mapping[str, Any]]) -> int:
    """Return the epochs of the longest trial, of those that are known and those that the space allows."""
    from raypkg.cluster.tune import candidates

    def epochs(values: Mapping[str, Any]) -> int:
        return load(type(settings), settings.model_dump(mode="json"), values).epochs

    tried = {name: [(epochs({name: value}), value) for value in candidates(d)] for name, d in space.domains.items()}
    longest = {name: max(values, key=itemgetter(0))[1] for name, values in tried.items() if values}
    return max(epochs(values) for values in (longest, *known))


def checker(settings: Any, order: Order) -> Callable[[Any], None]:
    """Return what refuses settings of a trial that a single run, on all samples or on the proxy's, would refuse."""
    from raypkg.phases.samples import samples

    n = len(samples(settings.dataset, settings.seed).kept)

    def check(trial: Any) -> None:
        check_names(trial)
        trial.check(n)
        if order.proxy:
            trial.check(max(1, round(order.proxy * n)))

    return check

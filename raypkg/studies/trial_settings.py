"""What each trial sets: drawn from the space, joined with what all trials share, and checked as a single run is."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import islice
from operator import itemgetter
from typing import Any, TypeVar

from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.seeds import derive
from raypkg.core.settings import Dataset, Experiment, RunSettings, Training
from raypkg.experiments.resolve import check_names

from .figures import METRICS
from .order import EVALUATE, Order
from .spaces import Space

DRAWS = 1000  # in search of settings that no trial has
Values = dict[str, Any]  # what a trial sets, by dotted names
E = TypeVar("E", bound=Experiment)


def trials_of(order: Order, space: Space, settings: Experiment) -> list[Values]:
    """Return what each trial sets, as far as it is known beforehand, no two the same: of a small space all there is.

    Raises:
        UserError: a grid over a range, or a searcher that is not installed.
    """
    from raypkg.cluster.search import grid, optuna

    match order.search:
        case "grid":
            return list(grid(space.domains))
        case "optuna":  # it thinks of a trial when one begins; here it only shows whether it can
            assert order.metric and order.mode
            optuna(space.domains, order.metric, order.mode, settings.seed, [])
            return []
    return _drawn(space, order.samples or 0, settings.seed)


def _drawn(space: Space, samples: int, seed: int) -> list[Values]:
    """Return random settings of so many trials; where no new ones turn up, of fewer."""
    import numpy as np

    from raypkg.cluster.search import draw_settings

    trials: list[Values] = []
    for number in range(samples):
        rng = np.random.default_rng(derive(seed, "sweep", number))
        draws = (draw_settings(space.domains, rng) for _ in range(DRAWS))
        new = (values for values in draws if values not in trials)
        trials += islice(new, 1)
    return trials


def varied(base: E, values: Mapping[str, Any]) -> E:
    """Return the settings that all trials share with what one of them sets.

    Raises:
        UserError: an unknown setting, or a value that it does not allow.
    """
    return load_settings(type(base), base.model_dump(mode="json"), values)


def longest_of(settings: Experiment, space: Space, known: Sequence[Mapping[str, Any]]) -> int:
    """Return the epochs of the longest trial, of those that are known and those that the space allows."""
    import numpy as np

    from raypkg.cluster.search import candidates, draw_settings

    def epochs(values: Mapping[str, Any]) -> int:
        return varied(settings, values).epochs

    # A value alone may be refused without others that go with it, such as crest.h without crest.tau.
    drawn = draw_settings(space.domains, np.random.default_rng(settings.seed))
    longest = {**drawn, **(known[0] if known else {})}  # a known trial has been checked
    for name, domain in space.domains.items():
        lengths = [(epochs({**longest, name: value}), value) for value in candidates(domain)]
        if lengths:
            longest[name] = max(lengths, key=itemgetter(0))[1]
    return max(epochs(values) for values in (longest, *known))


def check_trial(order: Order, base: Experiment, values: Mapping[str, Any]) -> None:
    """Refuse settings of a trial that a single run, would refuse, or not measure.

    Raises:
        UserError: what is wrong.
    """
    trial = varied(base, values)
    check_names(trial)
    _check_measured(order, trial)
    n = samples_of(trial)
    trial.check(n)


def samples_of(trial: Experiment) -> int:
    """Return how many samples a trial trains on."""
    coreset = getattr(trial, "coreset", None)
    return _count(trial.dataset.model_dump_json(), trial.seed, coreset)


@lru_cache
def _count(dataset: str, seed: int, coreset: str | None) -> int:
    from raypkg.experiments.coreset_files import load_coreset
    from raypkg.experiments.samples import open_samples

    settings = RunSettings(seed=seed, dataset=Dataset.model_validate_json(dataset))
    samples = open_samples(settings)
    if coreset is None:
        return len(samples.train_indices)
    return len(load_coreset(coreset, samples.data.train, samples.held_out, settings.dataset.name))


def _check_measured(order: Order, trial: Experiment) -> None:
    """Refuse a metric that no epoch of the trial would have."""
    assert order.metric
    if not METRICS[order.metric].held_out:
        return
    if not trial.dataset.validation:
        raise UserError(f"metric {order.metric} is measured on held-out samples: dataset.validation = 0 holds out none")
    train: Training = trial.train  # type: ignore[attr-defined]  # every experiment declares its own
    every = train.evaluate_every_epochs
    if not 0 < every <= trial.epochs:
        raise UserError(f"metric {order.metric} would never be measured: {EVALUATE} = {every} of {trial.epochs} epochs")

"""Settings of a study's trials: random draws and grids over Ray Tune's domains, Optuna, and their order."""

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from math import prod
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.sample import Categorical, Domain, Float, Function, Integer, Quantized

from raypkg.core.errors import UserError

Values = dict[str, Any]  # settings of a trial, by dotted names
LARGEST_GRID = 10_000  # trials


def candidates(domain: Any) -> list[Any]:
    """Return the values of a domain to validate: every choice, both ends of a range, a plain value."""
    match domain:
        case {"grid_search": values}:
            return [_plain(value) for value in values]
        case Categorical():
            return [_plain(value) for value in domain.categories]
        case Integer():
            # Tune excludes the upper end of a range of integers, unless the range has steps.
            has_steps = isinstance(domain.get_sampler(), Quantized)
            return [domain.lower, domain.upper if has_steps else domain.upper - 1]
        case Float():
            ends = (domain.lower, domain.upper)
            return [end for end in ends if np.isfinite(end)]
        case Domain():
            return []
    return [_plain(domain)]


def constants(space: Mapping[str, Any]) -> Values:
    """Return the settings to which a space gives a plain value."""
    return {name: _plain(value) for name, value in space.items() if not isinstance(value, Domain | dict)}


def draw_settings(space: Mapping[str, Any], rng: np.random.Generator) -> Values:
    """Return one value of every domain."""
    values = {}
    for name, domain in space.items():
        if isinstance(domain, dict) and "grid_search" in domain:
            domain = tune.choice(list(domain["grid_search"]))
        is_domain = isinstance(domain, Domain)
        values[name] = _plain(domain.sample(random_state=rng) if is_domain else domain)
    return values


def grid(space: Mapping[str, Any]) -> Iterable[Values]:
    """Return every combination of the space's choices; refuse ranges that are continuous or have steps."""
    axes: list[range | list[Any]] = []
    for name, domain in space.items():
        has_steps = isinstance(domain, Integer) and isinstance(domain.get_sampler(), Quantized)
        if has_steps or isinstance(domain, Float | Function):
            problem = f"{name} is drawn from a continuous range, or one with steps"
            raise UserError(f"--search grid: {problem}; list its values or use random")
        axes.append(range(domain.lower, domain.upper) if isinstance(domain, Integer) else candidates(domain))
    combinations = prod(len(axis) for axis in axes)
    if combinations > LARGEST_GRID:
        raise UserError(f"--search grid: {combinations:,} combinations, at most {LARGEST_GRID:,} are allowed")
    return (dict(zip(space, values, strict=True)) for values in product(*axes))


def _plain(value: Any) -> Any:
    """Return a NumPy number as a Python number, which JSON and TOML can store."""
    return value.item() if isinstance(value, np.generic) else value


def optuna(
    space: Mapping[str, Any], metric: str, mode: str, seed: int, done: Sequence[tuple[Values, float]]
) -> Searcher:
    """Return Optuna's sampler on a space, informed by the settings and the metric of the trials already done."""
    from ray.tune.search.optuna import OptunaSearch

    if not find_spec("optuna"):
        raise UserError("--search optuna needs Optuna: pip install 'effray[optuna]'")
    fixed = constants(space)
    varied = {name: domain for name, domain in space.items() if name not in fixed}
    if not varied:
        raise UserError("--search optuna: the space has plain values only, and nothing to search")
    logging.getLogger("optuna").setLevel(logging.WARNING)
    try:
        distributions = OptunaSearch.convert_search_space(varied)
        searcher = OptunaSearch(distributions, metric=metric, mode=mode, seed=seed % 2**32)
    except ValueError as error:
        raise UserError(f"--search optuna: {error}") from None
    for values, reached in done:
        point = {name: values[name] for name in varied}
        searcher.add_evaluated_point(point, reached)
    return searcher


class Proposals(Searcher):
    """Supplies trials: first the waiting ones, then those with ``further`` numbers.

    The searcher suggests the settings of further trials, which have the ``fixed`` ones in addition.
    """

    def __init__(
        self,
        waiting: Iterable[tuple[int, Values]],
        searcher: Searcher | None = None,
        further: Iterable[int] = (),
        fixed: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self._waiting = deque(waiting)
        self._searcher = searcher
        self._further = deque(further)
        self._fixed = dict(fixed or {})
        self._known: dict[str, Values] = {}  # settings of known trials by Tune's trial ids
        self.count = len(self._waiting) + len(self._further)

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's number and settings."""
        if self._waiting:
            number, values = self._waiting.popleft()
            self._known[trial_id] = values
            return {"number": number, "values": values}
        if not (self._searcher and self._further):
            return Searcher.FINISHED
        suggested = self._searcher.suggest(trial_id)
        if not isinstance(suggested, dict):  # nothing yet, or finished
            return suggested
        return {"number": self._further.popleft(), "values": self._fixed | suggested}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass a trial's result to the searcher."""
        if self._searcher is None:
            return
        if trial_id not in self._known:
            self._searcher.on_trial_complete(trial_id, result, error)
        elif result and self._searcher.metric in result:
            values = self._known[trial_id]
            varied = {name: value for name, value in values.items() if name not in self._fixed}
            self._searcher.add_evaluated_point(varied, result[self._searcher.metric])

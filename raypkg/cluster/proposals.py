"""Which trial comes next: first those whose settings are known, then those that Optuna suggests."""

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ray.tune.search import Searcher

from raypkg.core.errors import UserError

from .drawing import Values, constants


def optuna(
    space: Mapping[str, Any], metric: str, mode: str, seed: int, done: Sequence[tuple[Values, float]]
) -> Searcher:
    """Return Optuna's sampler on a space.

    Args:
        space: domains by dotted names.
        metric: to optimise.
        mode: max or min.
        seed: of its draws.
        done: settings and metric of trials that it is to learn from.

    Raises:
        UserError: Optuna is not installed, or the space has a domain that it does not know.
    """
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
    """Hands out numbered trials: those whose settings are known first, then what a searcher suggests.

    Args:
        waiting: number and settings of the trials that are known.
        searcher: suggests the settings of further ones.
        further: their numbers.
        fixed: what each of them sets as well.
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
        self._known: dict[str, Values] = {}  # settings of those that were waiting, by Tune's names of the trials
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
        if not isinstance(suggested, dict):  # nothing yet, or nothing any more
            return suggested
        return {"number": self._further.popleft(), "values": self._fixed | suggested}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the searcher what came of a trial."""
        if self._searcher is None:
            return
        if trial_id not in self._known:
            self._searcher.on_trial_complete(trial_id, result, error)
        elif result and self._searcher.metric in result:
            values = self._known[trial_id]
            varied = {name: value for name, value in values.items() if name not in self._fixed}
            self._searcher.add_evaluated_point(varied, result[self._searcher.metric])

"""Settings drawn from Ray Tune's domains: at random, all of a grid, and what a space must be checked with."""

from collections.abc import Iterable, Mapping
from itertools import product
from math import prod
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Function, Integer, Quantized

from raypkg.core.errors import UserError

Values = dict[str, Any]  # what a trial sets, by dotted names
LARGEST_GRID = 10_000  # trials


def candidates(domain: Any) -> list[Any]:
    """Return what must be allowed for all of a domain to be: each of a choice, the ends of a range, a plain value."""
    match domain:
        case {"grid_search": values}:
            return [_plain(value) for value in values]
        case Categorical():
            return [_plain(value) for value in domain.categories]
        case Integer():
            # Tune leaves the upper end out of a range of integers, unless the range has steps.
            largest = domain.upper if _in_steps(domain) else domain.upper - 1
            return [domain.lower, largest]
        case Float():
            ends = (domain.lower, domain.upper)
            return [end for end in ends if np.isfinite(end)]
        case Domain():
            return []
    return [_plain(domain)]


def constants(space: Mapping[str, Any]) -> Values:
    """Return what a space gives a single plain value."""
    return {name: _plain(value) for name, value in space.items() if not isinstance(value, Domain | dict)}


def draw_settings(space: Mapping[str, Any], rng: np.random.Generator) -> Values:
    """Return one value of every domain."""
    return {name: _draw(domain, rng) for name, domain in space.items()}


def grid(space: Mapping[str, Any]) -> Iterable[Values]:
    """Return every combination of the space's choices.

    Raises:
        UserError: a domain is continuous, or has steps that only Ray knows, or there are too many combinations.
    """
    axes = [_axis(name, domain) for name, domain in space.items()]
    combinations = prod(len(axis) for axis in axes)
    if combinations > LARGEST_GRID:
        raise UserError(f"--search grid: {combinations:,} combinations, of which {LARGEST_GRID:,} can be tried")
    return (dict(zip(space, values, strict=True)) for values in product(*axes))


def _axis(name: str, domain: Any) -> range | list[Any]:
    """Return all values of one setting."""
    stepped = isinstance(domain, Integer) and _in_steps(domain)
    if stepped or isinstance(domain, Float | Function):
        raise UserError(
            f"--search grid: {name} is drawn from a continuous range, or one with steps; list its values or use random"
        )
    if isinstance(domain, Integer):
        return range(domain.lower, domain.upper)
    return candidates(domain)


def _in_steps(domain: Integer) -> bool:
    return isinstance(domain.get_sampler(), Quantized)


def _draw(domain: Any, rng: np.random.Generator) -> Any:
    match domain:
        case {"grid_search": values}:
            domain = tune.choice(list(values))
        case Domain():
            pass
        case _:
            return _plain(domain)
    value = domain.sample(random_state=rng)
    return _plain(value)


def _plain(value: Any) -> Any:
    """Return a number of NumPy's as Python's, which JSON and TOML hold."""
    return value.item() if isinstance(value, np.generic) else value

"""Rules of dynamic sparse training, one file for each name: where to begin, what to drop, what to grow, and where.

    @initial(name)         masks(model, density, *, rng, batch) → Masks
    @drop(name)            score(weight) → of a layer's active weights [k]; the lowest go, ∞ stays
    @growth(name)          score(weight, *, gradient, momentum, rng) → like the layer; the highest inactive ones come
    @redistribution(name)  share(weight, *, momentum) → of a layer's active weights [k]; its part of what is grown

A rule leaves out the keywords that it does not need, and they are not computed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from raypkg.core.config import Named
from raypkg.core.errors import UserError
from raypkg.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

_PACKAGE = "raypkg.methods.sparse.rules"
initial = Registry("sparse initialisation", _PACKAGE, given=("rng", "batch"), decorator="initial")
drop = Registry("drop rule", _PACKAGE, decorator="drop")
growth = Registry("growth rule", _PACKAGE, given=("gradient", "momentum", "rng"), decorator="growth")
redistribution = Registry("redistribution", _PACKAGE, given=("momentum",))

_DIVERGED = "where the weights are not finite, lower the learning rate"


def uses_momentum(registry: Registry, rule: Named | None) -> bool:
    """Say whether a chosen rule, if there is one, needs the dense gradient of every step."""
    return rule is not None and "momentum" in registry[rule.name].declares


def checked_scores(rule: str, scores: object, weights: Tensor, layer: str) -> Tensor:
    """Return what a rule scored, on the device of the weights.

    Args:
        rule: its kind and name, for the error.
        scores: what it returned.
        weights: those it was to score.
        layer: their name.

    Raises:
        UserError: it is not a number for each weight; ∞ is one.
    """
    from torch import Tensor

    if not isinstance(scores, Tensor) or scores.shape != weights.shape:
        returned = list(scores.shape) if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise UserError(f"{rule} returned {returned} for {list(weights.shape)} of {layer}")
    if scores.isnan().any():
        raise UserError(f"{rule} returned NaN for {layer}: {_DIVERGED}")
    return scores.to(weights.device)


def checked_share(rule: str, share: object, layer: str) -> float:
    """Return the share that a redistribution gave to a layer.

    Raises:
        UserError: it is not a finite number from 0.
    """
    if not isinstance(share, int | float) or not 0 <= share < math.inf:
        raise UserError(f"{rule} returned {share} for {layer}, not a share: {_DIVERGED}")
    return float(share)

"""Learning rate over training: pure functions of the share of training done."""

import math

from raypkg.core.settings import Training


def cosine(t: float, settings: Training) -> float:
    """Fall from 1 to 0 along half a cosine: ½(1 + cos πt)."""
    return 0.5 * (1 + math.cos(math.pi * t))


def descent(t: float, settings: Training) -> float:
    """Fall in a line, from 1 at the end of the warm-up to 0: (1 − t)/(1 − warmup)."""
    return min(1.0, (1 - t) / (1 - settings.warmup))


def multistep(t: float, settings: Training) -> float:
    """Drop at each milestone: drop^(milestones passed)."""
    return settings.lr_drop ** sum(t >= milestone for milestone in settings.milestones)


def constant(t: float, settings: Training) -> float:
    """Stay at 1."""
    return 1.0


SHAPES = {"cosine": cosine, "linear": descent, "multistep": multistep, "constant": constant}


def learning_rate(settings: Training, t: float) -> float:
    """Return the learning rate after the share ``t`` of training, 0 ≤ t < 1.

    The rate rises linearly over the warm-up share of training; the schedule spans all of training, but the fall of
    ``linear`` begins where the rise ends.

    >>> learning_rate(Training(lr=0.2, schedule="multistep", milestones=[0.5]), 0.6)
    0.020000000000000004
    """
    rise = min(1.0, (t + 1e-3) / settings.warmup) if settings.warmup else 1.0
    return settings.lr * rise * SHAPES[settings.schedule](t, settings)

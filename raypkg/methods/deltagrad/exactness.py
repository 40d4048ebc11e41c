"""Which steps of a replay are exact: at a fixed period, or as often as a tolerance on the distance asks for."""

from typing import Protocol


class When(Protocol):
    """Decides step by step; steps before anything has changed are not counted."""

    def due(self, rate: float, share: float, distance: float) -> bool:
        """Say whether the coming step is to be exact.

        Args:
            rate: η of the step.
            share: samples of the recorded batch over those of the new one.
            distance: ‖v‖ from the record.
        """

    def took(self, rate: float, share: float, distance: float, error: float | None, exact: bool) -> None:
        """Take notice of a step; ``error`` is ‖predicted − true gradient‖ where an exact step had a prediction."""


class Periodic:
    """Exact for the first j0 steps and then at every T0-th (DeltaGrad, arXiv:2006.14755).

    >>> when, pattern = Periodic(period=3, burn_in=2), ""
    >>> for _ in range(9):
    ...     exact = when.due(0.1, 1.0, 1.0)
    ...     when.took(0.1, 1.0, 1.0, None, exact)
    ...     pattern += "x" if exact else "."
    >>> pattern
    'xx..x..x.'
    """

    estimate = None  # it knows nothing of the distance

    def __init__(self, period: int, burn_in: int):
        self._period, self._burn_in = period, burn_in
        self._age = self._since = 0

    def due(self, rate: float, share: float, distance: float) -> bool:
        """Say whether the step is one of the first, or the T0-th since the last exact one."""
        return self._age < self._burn_in or self._since + 1 >= self._period

    def took(self, rate: float, share: float, distance: float, error: float | None, exact: bool) -> None:
        """Count the step."""
        self._age += 1
        self._since = 0 if exact else self._since + 1


class Tolerant:
    """Exact as soon as the estimated distance from the retrained weights outgrows its share of a tolerance.

    An approximate step whose gradient is wrong by ε moves the weights away by η·share·‖ε‖, and later steps of a convex
    problem shrink that by 1 − ηλ each. At the k-th step after an exact one ‖ε‖ is taken to be ρ·k·‖v‖; every exact step
    measures ρ and so corrects what was estimated since the last. The estimate E is held below its share of the
    tolerance, (Ση so far)/Ση.

    Not in the paper, which fixes a period. Errors add up here as if they never cancelled, so E is pessimistic for
    convex problems; for others it bounds nothing and remains an estimate.

    Args:
        tolerance: the distance ‖w − retrained w‖ to stay below.
        horizon: Ση over all steps that may be approximate.
        decay: λ of the L2 penalty.
    """

    def __init__(self, tolerance: float, horizon: float, decay: float):
        self._tolerance, self._horizon, self._decay = tolerance, horizon, decay
        self._growth: float | None = None  # ρ
        self._settled = 0.0  # E up to the last exact step
        self._open = 0.0  # Σ η·share·k·‖v‖ since then
        self._since, self._spent = 0, 0.0

    @property
    def estimate(self) -> float:
        """E, the estimated distance from the retrained weights so far."""
        return self._settled + (self._growth or 0.0) * self._open

    def due(self, rate: float, share: float, distance: float) -> bool:
        """Say whether an approximate step would take E beyond what is allowed by now."""
        if self._growth is None:
            return True
        coming = self._growth * rate * share * (self._since + 1) * distance
        return self.estimate + coming > self._tolerance * (self._spent + rate) / self._horizon

    def took(self, rate: float, share: float, distance: float, error: float | None, exact: bool) -> None:
        """Add the step to the estimate; an exact one settles it with the ρ that it measured."""
        if exact:
            if error is not None:
                measured = error / ((self._since + 1) * distance)
                self._settled += measured * self._open
                self._growth = max(measured, (self._growth or 0.0) / 2)
                self._open = 0.0
            self._since = 0
        else:
            self._since += 1
            self._open += rate * share * self._since * distance
        self._settled *= 1 - rate * self._decay
        self._open *= 1 - rate * self._decay
        self._spent += rate

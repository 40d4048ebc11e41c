"""Which steps of a replay are exact: at a fixed period, or as often as a tolerance on the distance asks for."""

from typing import NamedTuple, Protocol


class Drift(NamedTuple):
    """How far a replay is from its record before a step.

    Attributes:
        rate: η of the step.
        share: samples of the recorded batch over those of the new one.
        distance: ‖v‖, of the weights from the recorded ones.
    """

    rate: float
    share: float
    distance: float


class ExactSteps(Protocol):
    """Decides step by step; steps before the first changed batch are not counted."""

    @property
    def estimate(self) -> float | None:
        """The estimated distance from the retrained weights so far; None where nothing estimates it."""

    def due(self, drift: Drift) -> bool:
        """Return whether the coming step is to be exact."""

    def took(self, drift: Drift, exact: bool, error: float | None) -> None:
        """Count a step; ``error`` is ‖predicted − true gradient‖ where an exact step had a prediction."""


class Periodic:
    """Exact for the first j0 steps and then at every T0-th (DeltaGrad, arXiv:2006.14755).

    >>> exact_steps = Periodic(period=3, burn_in=2)
    >>> pattern = ""
    >>> for _ in range(9):
    ...     exact = exact_steps.due(Drift(rate=0.1, share=1.0, distance=1.0))
    ...     exact_steps.took(Drift(rate=0.1, share=1.0, distance=1.0), exact, error=None)
    ...     pattern += "x" if exact else "."
    >>> pattern
    'xx..x..x.'
    """

    estimate = None  # a period knows nothing of the distance

    def __init__(self, period: int, burn_in: int):
        self._period = period
        self._burn_in = burn_in
        self._steps = 0
        self._since_exact = 0

    def due(self, drift: Drift) -> bool:
        """Return whether the step is one of the first, or the T0-th since the last exact one."""
        is_first = self._steps < self._burn_in
        is_periodic = self._since_exact + 1 >= self._period
        return is_first or is_periodic

    def took(self, drift: Drift, exact: bool, error: float | None) -> None:
        """Count the step."""
        self._steps += 1
        self._since_exact = 0 if exact else self._since_exact + 1


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
        self._tolerance = tolerance
        self._horizon = horizon
        self._decay = decay
        self._growth: float | None = None  # ρ; None until an exact step has measured it
        self._settled = 0.0  # E up to the last exact step
        self._open = 0.0  # Σ η·share·k·‖v‖ since then: times ρ it is the rest of E
        self._since_exact = 0  # k
        self._rates = 0.0  # Ση so far

    @property
    def estimate(self) -> float:
        """E, the estimated distance from the retrained weights so far."""
        return self._settled + (self._growth or 0.0) * self._open

    def due(self, drift: Drift) -> bool:
        """Return whether an approximate step would take E beyond what is allowed by now."""
        if self._growth is None:
            return True
        rate, share, distance = drift
        steps = self._since_exact + 1  # k
        coming = self._growth * rate * share * steps * distance
        allowed = self._tolerance * (self._rates + rate) / self._horizon
        return self.estimate + coming > allowed

    def took(self, drift: Drift, exact: bool, error: float | None) -> None:
        """Add the step to the estimate; an exact one settles it with the ρ that it measured."""
        rate, share, distance = drift
        if exact:
            if error is not None:
                steps = self._since_exact + 1
                self._settle(error / (steps * distance))
            self._since_exact = 0
        else:
            self._since_exact += 1
            self._open += rate * share * self._since_exact * distance
        # The L2 penalty pulls both trainings towards 0, hence towards each other.
        shrinkage = 1 - rate * self._decay
        self._settled *= shrinkage
        self._open *= shrinkage
        self._rates += rate

    def _settle(self, measured: float) -> None:
        """Charge the approximate steps since the last exact one with the ρ that has now been measured."""
        self._settled += measured * self._open
        self._open = 0.0
        # One lucky measurement does not open the way to a long run of approximate steps.
        self._growth = max(measured, (self._growth or 0.0) / 2)

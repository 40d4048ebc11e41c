"""How long a local model is trusted, how many mini-batch coresets it takes, and which samples are learned."""

from torch import Tensor


def check_interval(h: float, first: float, now: float) -> int:
    """Return the steps between checks, T1 = h · ‖H̄_0‖ / ‖H̄_t‖, rounded, at least 1: the flatter, the longer.

    Args:
        h: the multiplier.
        first: ‖H̄_0‖.
        now: ‖H̄_t‖.

    Without curvature (0) nothing says when to check again, so T1 = max(1, h).

    >>> interval(1, 8.0, 2.0), interval(1, 2.0, 8.0), interval(10, 0.0, 0.0)
    (4, 1, 10)
    """
    return max(1, round(h * first / now)) if now > 0 and first > 0 else max(1, round(h))


def remaining(active: Tensor, highest: Tensor, alpha: float, least: int) -> Tensor:
    """Return which samples stay active: all but those whose recorded losses were all at most α.

    Args:
        active: bool [n].
        highest: the highest loss recorded since the last drop, −∞ where there is none: those stay [n].
        alpha: α.
        least: if fewer than so many would stay, nothing is dropped.

    >>> import torch
    >>> remaining(torch.ones(4, dtype=bool), torch.tensor([0.05, 0.2, -torch.inf, 0.1]), 0.1, least=1)
    tensor([False,  True,  True, False])
    """
    learned = (highest <= alpha) & highest.isfinite()
    stay = active & ~learned
    return stay if int(stay.sum()) >= least else active

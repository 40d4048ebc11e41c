"""DeltaGrad: training replayed with other samples in its batches, most gradients taken from the record."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 1e-3  # of the initial curvature σ
GradientSum = Callable[[Tensor, Tensor], Tensor]  # (w [p], samples) → Σ ∇loss_i(w) [p]


class ChangedStep(NamedTuple):
    """A recorded step, and the change of its batch."""

    rate: float  # learning rate η
    w: Tensor  # weights before the step, w_t, float64 [p]
    gradient: Tensor  # mean loss gradient g_t of the recorded batch at w_t, without the L2 term, float64 [p]
    after: Tensor  # weights after the step, w_{t+1}, float64 [p]
    kept: Tensor  # samples of both batches, int64
    gone: Tensor  # samples of the recorded batch only
    came: Tensor  # samples of the new batch only


class ReplayedStep(NamedTuple):
    """A step of the new training: exact, or nearly."""

    rate: float  # learning rate η
    w: Tensor  # weights before the step, float64 [p]
    gradient: Tensor  # mean loss gradient of the new batch at w, without the L2 term, float64 [p]
    after: Tensor  # weights after the step, float64 [p]
    exact: bool  # True if the gradients of the kept samples were computed


def replay(
    steps: Iterable[ChangedStep],
    gradient: GradientSum,
    exact_steps: "Periodic",
    *,
    decay: float,
    pairs: int = 2,
    convex: bool = True,
) -> Iterator[ReplayedStep]:
    """Yield every step of training with the changed batches (DeltaGrad, arXiv:2006.14755, algorithms 1 and 3).

    With v = w − w_t the distance from the record and B the BFGS matrix of F + λ/2 ‖·‖², the gradients of the kept
    samples sum up to

        Σ_kept ∇loss_i(w)                               at exact steps; (v, change of gradient + λv) joins B's pairs
        |batch| · (g_t + Bv − λv) − Σ_gone ∇loss_i(w)   at the others; only the few samples that are gone are computed

    and w ← w − η ((Σ_kept + Σ_came)/|new batch| + λw). An empty new batch is skipped, decay included.

    Differs from the paper: the record is passed through until the first changed batch, and j0 and T0 count from there.
    For convex models too, a pair without positive curvature is dropped. A step is exact where B cannot be trusted.
    Models that are not ``convex`` have the paper's gate for them: an exact step wherever ‖v‖ ≤ ‖Bv‖.
    """
    hessian = BFGS(pairs)
    w: Tensor | None = None  # None until the first changed batch: both trainings are the same up to there
    for step in steps:
        old_size = len(step.kept) + len(step.gone)
        new_size = len(step.kept) + len(step.came)
        if w is None:
            if not len(step.gone) and not len(step.came):
                yield ReplayedStep(step.rate, step.w, step.gradient, step.after, exact=False)
                continue
            w = step.w
        if not new_size:
            yield ReplayedStep(step.rate, w, torch.zeros_like(w), w, exact=False)
            continue

        v = w - step.w
        distance = v.norm()
        sum_gone = gradient(w, step.gone)  # Σ_gone ∇loss_i(w)
        sum_came = gradient(w, step.came)  # Σ_came ∇loss_i(w)
        exact = False
        if not distance:  # the recorded gradient is the true one, and the step teaches B nothing
            sum_kept = old_size * step.gradient - sum_gone
        else:
            # g_t + Bv − λv, the gradient of the recorded batch at w, if B can be trusted
            predicted: Tensor | None = None
            if hessian:
                product = hessian.product(v)  # Bv
                # A convex training at a stable rate has η‖Hv‖² ≤ 2vᵀHv, so that ‖v − ηHv‖ ≤ ‖v‖. Pairs from small,
                # unlike batches can make a B without that property; steps along it blow up.
                stable = step.rate * (product @ product) <= 2 * (v @ product)
                trusted = stable if convex else distance > product.norm()
                if trusted:
                    predicted = step.gradient + product - decay * v
            if predicted is None or exact_steps.due():
                exact = True
                sum_kept = gradient(w, step.kept)
                # A batch that was empty has no recorded gradient to learn from; 1 only avoids 0/0.
                true = (sum_kept + sum_gone) / max(1, old_size)
                if predicted is not None:
                    exact_steps.predicted((predicted - true).norm().item(), (true - step.gradient).norm().item())
                if old_size:
                    hessian.push(v, true - step.gradient + decay * v)
            else:
                sum_kept = old_size * predicted - sum_gone
            exact_steps.took(exact)

        mean = (sum_kept + sum_came) / new_size
        after = w - step.rate * (mean + decay * w)
        yield ReplayedStep(step.rate, w, mean, after, exact)
        w = after


def retrain(
    steps: Iterable[tuple[float, Tensor]], w: Tensor, gradient: GradientSum, *, decay: float
) -> Iterator[Tensor]:
    """Yield the weights, float64 [p], after every step of SGD from w: the training that a replay approximates.

    A step is η and the samples of its batch; an empty batch is skipped.
    """
    for rate, batch in steps:
        if len(batch):
            mean = gradient(w, batch) / len(batch)
            w = w - rate * (mean + decay * w)
        yield w


# The approximate Hessian, and the choice of exact steps


class BFGS:
    """The BFGS matrix B of the newest m pairs (s, y), in compact form.

    B v = σ v − [Y σS] M⁻¹ [Yᵀ v; σSᵀ v] with M = [[−D, Lᵀ], [L, σSᵀS]], D and L the diagonal and the strictly lower
    part of SᵀY, and σ = yᵀs/sᵀs of the newest pair, at least 1e-3 (Byrd, Nocedal & Schnabel 1994, theorem 2.3;
    DeltaGrad, arXiv:2006.14755, algorithm 2).
    """

    def __init__(self, pairs: int):
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=pairs)

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def push(self, s: Tensor, y: Tensor) -> bool:
        """Add a step s [p] and the gradient's change y [p]; return False for sᵀy ≤ 0, which is dropped.

        With such a pair B would not stay positive definite.
        """
        curvature = s @ y
        if not curvature > 0:
            return False
        self._pairs.append((s, y))
        self._sigma = max((curvature / (s @ s)).item(), LEAST)

        # [Y σS] M⁻¹ is the same for every v until the next pair.
        steps = torch.stack([s for s, _ in self._pairs])  # Sᵀ [m, p]
        changes = torch.stack([y for _, y in self._pairs])  # Yᵀ [m, p]
        products = steps @ changes.T  # SᵀY [m, m]
        lower = products.tril(-1)  # L
        diagonal = products.diagonal().diag()  # D
        squares = self._sigma * (steps @ steps.T)  # σSᵀS
        upper_half = torch.cat([-diagonal, lower.T], 1)
        lower_half = torch.cat([lower, squares], 1)
        middle = torch.cat([upper_half, lower_half])  # M [2m, 2m]
        self._right = torch.cat([changes, self._sigma * steps])  # [Y σS]ᵀ [2m, p]
        self._left = torch.linalg.solve(middle, self._right).T  # [Y σS] M⁻¹ [p, 2m], as M is symmetric
        return True

    def product(self, v: Tensor) -> Tensor:
        """Return B v [p]; needs at least one pair."""
        correction = self._left @ (self._right @ v)
        return self._sigma * v - correction


class Periodic:
    """Makes the first j0 steps exact and then every T0-th (DeltaGrad, arXiv:2006.14755).

    Differs from the paper where ``settled`` is set: j0 ends after an exact step whose gradient had been predicted with
    an error of at most ``settled`` times its distance from the recorded one.

    >>> exact_steps = Periodic(period=3, burn_in=2)
    >>> pattern = ""
    >>> for _ in range(9):
    ...     exact = exact_steps.due()
    ...     exact_steps.took(exact)
    ...     pattern += "x" if exact else "."
    >>> pattern
    'xx..x..x.'
    """

    def __init__(self, period: int, burn_in: int, settled: float | None = None):
        self._period = period
        self._burn_in = burn_in
        self._settled = settled or -1.0  # less than any error
        self._steps = 0
        self._since_exact = 0

    def due(self) -> bool:
        """Return True if the step is one of the first, or the T0-th since the last exact one."""
        return self._steps < self._burn_in or self._since_exact + 1 >= self._period

    def predicted(self, error: float, moved: float) -> None:
        """End j0 if the error of a predicted gradient is small against its distance from the recorded one."""
        if error <= self._settled * moved:
            self._burn_in = 0

    def took(self, exact: bool) -> None:
        """Count a step."""
        self._steps += 1
        self._since_exact = 0 if exact else self._since_exact + 1

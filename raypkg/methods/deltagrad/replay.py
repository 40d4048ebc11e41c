"""Training replayed with other samples in its batches, most of its gradients taken from the record."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .curvature import Curvature
from .exact_steps import Drift, ExactSteps


class ChangedStep(NamedTuple):
    """A recorded step, and what is now different about its batch.

    Attributes:
        rate: learning rate η.
        w: weights before the step, w_t, float64 [p].
        gradient: mean loss gradient g_t of the recorded batch at w_t, without the L2 term, float64 [p].
        after: weights after the step, w_{t+1}, float64 [p].
        kept: samples in the recorded batch and still in it, int64.
        gone: samples in the recorded batch only.
        came: samples in the new batch only.
    """

    rate: float
    w: Tensor
    gradient: Tensor
    after: Tensor
    kept: Tensor
    gone: Tensor
    came: Tensor

    @property
    def old_size(self) -> int:
        """Samples in the recorded batch."""
        return len(self.kept) + len(self.gone)

    @property
    def new_size(self) -> int:
        """Samples in the new batch."""
        return len(self.kept) + len(self.came)

    @property
    def is_unchanged(self) -> bool:
        """Whether the batch holds the samples that it held."""
        return not len(self.gone) and not len(self.came)


class ReplayedStep(NamedTuple):
    """A step as it would have been, or nearly: the record of the new training.

    Attributes:
        rate: learning rate η.
        w: weights before the step, float64 [p].
        gradient: mean loss gradient of the new batch at w, without the L2 term, float64 [p].
        after: weights after the step, float64 [p].
        exact: whether the gradients of the kept samples were computed.
    """

    rate: float
    w: Tensor
    gradient: Tensor
    after: Tensor
    exact: bool


GradientSum = Callable[[Tensor, Tensor], Tensor]  # (w [p], samples) → Σ ∇loss_i(w) [p]


def replay(
    steps: Iterable[ChangedStep],
    gradient: GradientSum,
    exact_steps: ExactSteps,
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

    and w ← w − η ((Σ_kept + Σ_came)/|new batch| + λw). A new batch of no samples is skipped, decay included.

    Differs from the paper: as long as no batch has changed, the record is passed through, and j0 and T0 count from
    there; for convex models too a pair without positive curvature is refused, and a step is exact where η‖Bv‖² > 2vᵀBv,
    by which B shows that it is no Hessian of a stable training.

    Args:
        steps: the record, with both memberships.
        gradient: Σ ∇loss_i(w) of samples, float64 [p].
        exact_steps: decides which steps are exact.
        decay: λ of the L2 penalty.
        pairs: m, how many pairs B is made from.
        convex: False asks for an exact step wherever ‖v‖ ≤ ‖Bv‖, the paper's gate for other models.
    """
    curvature = Curvature(pairs)
    w: Tensor | None = None  # None until the first changed batch: up to there both trainings are the same
    for step in steps:
        if w is None and step.is_unchanged:
            yield ReplayedStep(step.rate, step.w, step.gradient, step.after, exact=False)
            continue
        w = step.w if w is None else w
        if not step.new_size:
            yield ReplayedStep(step.rate, w, torch.zeros_like(w), w, exact=False)
            continue
        mean, exact = _mean_gradient(step, w, gradient, curvature, exact_steps, decay, convex)
        after = w - step.rate * (mean + decay * w)
        yield ReplayedStep(step.rate, w, mean, after, exact)
        w = after


def _mean_gradient(
    step: ChangedStep,
    w: Tensor,
    gradient: GradientSum,
    curvature: Curvature,
    exact_steps: ExactSteps,
    decay: float,
    convex: bool,
) -> tuple[Tensor, bool]:
    """Return the mean loss gradient of the new batch at w [p], and whether it was computed exactly."""
    v = w - step.w
    distance = v.norm().item()
    sum_gone = gradient(w, step.gone)  # Σ_gone ∇loss_i(w)
    sum_came = gradient(w, step.came)  # Σ_came ∇loss_i(w)
    if not distance:  # the recorded gradient is the true one, and the step tells nothing about B
        sum_kept = step.old_size * step.gradient - sum_gone
        return (sum_kept + sum_came) / step.new_size, False

    drift = Drift(step.rate, step.old_size / step.new_size, distance)
    predicted = _predicted(step, v, curvature, decay, convex)
    error = None
    exact = predicted is None or exact_steps.due(drift)
    if exact:
        sum_kept = gradient(w, step.kept)
        # A batch that was empty has no recorded gradient to learn from; 1 only avoids 0/0.
        true = (sum_kept + sum_gone) / max(1, step.old_size)
        if predicted is not None:
            error = (predicted - true).norm().item()
        if step.old_size:
            curvature.push(v, true - step.gradient + decay * v)
    else:
        assert predicted is not None
        sum_kept = step.old_size * predicted - sum_gone
    exact_steps.took(drift, exact, error)
    return (sum_kept + sum_came) / step.new_size, exact


def _predicted(step: ChangedStep, v: Tensor, curvature: Curvature, decay: float, convex: bool) -> Tensor | None:
    """Return g_t + Bv − λv, the gradient of the recorded batch at w_t + v, or None where B cannot be trusted.

    A convex training whose rate is stable has η‖Hv‖² ≤ 2vᵀHv, so that ‖v − ηHv‖ ≤ ‖v‖. A matrix B without it is no
    average of such Hessians, and steps along it blow up; pairs from small batches, unlike each other, make such B.
    """
    if not curvature:
        return None
    product = curvature.product(v)  # Bv
    if convex:
        trusted = step.rate * (product @ product) <= 2 * (v @ product)
    else:
        trusted = v.norm() > product.norm()
    return step.gradient + product - decay * v if trusted else None


def retrain(
    steps: Iterable[tuple[float, Tensor]], w: Tensor, gradient: GradientSum, *, decay: float
) -> Iterator[Tensor]:
    """Yield the weights after every step of training from w with (η, samples of the batch): what replaying stands for.

    Args:
        steps: η and the batch's samples; a batch of none is skipped.
        w: initial weights, float64 [p].
        gradient: Σ ∇loss_i(w) of samples, float64 [p].
        decay: λ of the L2 penalty.
    """
    for rate, batch in steps:
        if len(batch):
            mean = gradient(w, batch) / len(batch)
            w = w - rate * (mean + decay * w)
        yield w

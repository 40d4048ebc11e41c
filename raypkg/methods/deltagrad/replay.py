"""Training replayed with other samples in its batches, most of its gradients taken from the record."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .curvature import Curvature
from .exactness import When


class Step(NamedTuple):
    """A recorded step, and what is now different about its batch.

    Attributes:
        rate: learning rate η.
        w: weights before the step, w_t, float64 [p].
        gradient: mean loss gradient of the recorded batch at w_t, without the L2 term, float64 [p].
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


class Replayed(NamedTuple):
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
    steps: Iterable[Step],
    gradient: GradientSum,
    when: When,
    *,
    decay: float,
    pairs: int = 2,
    convex: bool = True,
) -> Iterator[Replayed]:
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
        when: which steps are exact.
        decay: λ of the L2 penalty.
        pairs: m, how many pairs B is made from.
        convex: False asks for an exact step wherever ‖v‖ ≤ ‖Bv‖, the paper's gate for other models.
    """
    curvature, w = Curvature(pairs), None
    for rate, old, recorded, after, kept, gone, came in steps:
        before, now = len(kept) + len(gone), len(kept) + len(came)
        if w is None and not len(gone) + len(came):
            yield Replayed(rate, old, recorded, after, exact=False)
            continue
        w = old if w is None else w
        if not now:
            yield Replayed(rate, w, torch.zeros_like(w), w, exact=False)
            continue
        v = w - old
        distance, share = v.norm().item(), before / now
        sum_gone, sum_came = gradient(w, gone), gradient(w, came)  # Σ_gone ∇loss_i(w), Σ_came ∇loss_i(w)
        predicted = recorded if not distance else _predicted(recorded, curvature, v, rate, decay, convex)
        exact = distance > 0 and (predicted is None or when.due(rate, share, distance))
        if exact:
            sum_kept = gradient(w, kept)
            true = (sum_kept + sum_gone) / max(1, before)
            error = None if predicted is None else (predicted - true).norm().item()
            if before:
                curvature.push(v, true - recorded + decay * v)
        else:
            assert predicted is not None
            sum_kept, error = before * predicted - sum_gone, None
        if distance:
            when.took(rate, share, distance, error, exact)
        mean = (sum_kept + sum_came) / now
        following = w - rate * (mean + decay * w)
        yield Replayed(rate, w, mean, following, exact)
        w = following


def _predicted(
    recorded: Tensor, curvature: Curvature, v: Tensor, rate: float, decay: float, convex: bool
) -> Tensor | None:
    """Return g_t + Bv − λv, the gradient of the recorded batch at w_t + v, or None where B cannot be trusted.

    A convex training whose rate is stable has η‖Hv‖² ≤ 2vᵀHv, so that ‖v − ηHv‖ ≤ ‖v‖. A matrix B without it is no
    average of such Hessians, and steps along it blow up; pairs from small batches, unlike each other, make such B.
    """
    if not curvature:
        return None
    bent = curvature.product(v)
    trusted = rate * (bent @ bent) <= 2 * (v @ bent) if convex else v.norm() > bent.norm()
    return recorded + bent - decay * v if trusted else None


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
            w = w - rate * (gradient(w, batch) / len(batch) + decay * w)
        yield w

"""GradMatch: a weighted subset whose gradient is the gradient of all samples."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.methods.coreset import Coreset
from raypkg.methods.coresets import coreset
from raypkg.methods.gradients import HeadView
from raypkg.methods.solvers import largest, matching_pursuit

BLOCK = 4096  # samples that are in float64 at a time


@coreset("gradmatch", source="arXiv:2103.00123")
def select(
    view: HeadView,
    budget: int,
    *,
    valid: HeadView | None = None,
    lam: Annotated[float, Field(ge=0)] = 0.5,
    eps: Annotated[float, Field(gt=0)] = 1e-10,
    target: Literal["train", "valid"] = "train",
) -> Coreset:
    """Match the mean gradient by orthogonal matching pursuit with non-negative weights.

        v = argmin ‖Σ_{i∈S} v_i g_i − ḡ‖² + λ‖v‖²,  v ≥ 0,  |S| ≤ k        w = k·v

    so the gradient of the coreset's objective, mean(w · loss), is Σ v_i g_i ≈ ḡ. Equal gradients get
    w = ‖ḡ‖² / (‖ḡ‖² + λ/k), that is 1 but for the penalty. Where the pursuit needs fewer than k samples, those that
    correlate most with ḡ fill the budget at weight 0; if ḡ cannot be matched at all, every weight is 1.

    Args:
        view: the samples; the chosen gradients are matched in float64.
        budget: k.
        valid: samples whose mean gradient is ḡ if ``target`` is "valid".
        lam: λ, the penalty on the weights.
        eps: stop when the error is at most this share of ‖ḡ‖².
        target: whose mean gradient to match.

    Raises:
        UserError: the target is "valid" and there are no validation samples.

    Differs from the paper: ε is relative to ‖ḡ‖², and an atom whose weight would turn negative gives its place back.
    """
    atoms = Batches(view, torch.arange(len(view)), mean_gradient(view, valid, target), budget)
    chosen, v = matching_pursuit(atoms, atoms.energy, budget, lam=lam, eps=eps)
    indices = atoms.ranked(chosen)[:budget]
    if not len(chosen):
        return Coreset.uniform(indices)
    weights = torch.zeros(budget)
    weights[: len(chosen)] = budget * v
    return Coreset(indices, weights)


def mean_gradient(view: HeadView, valid: HeadView | None, target: str) -> Tensor:
    """Return the gradient to match, summed in float64 [C, D+1]."""
    samples = view if target == "train" else valid
    if samples is None or not len(samples):
        raise UserError("option target = 'valid': there are no validation samples")
    parts = (samples[i : i + BLOCK].double().sum() for i in range(0, len(samples), BLOCK))
    return sum(parts, start=torch.zeros((), dtype=torch.float64)) / len(samples)


class Batches:
    """The mean gradients ḡ_B of disjoint batches of samples, as atoms for a target t; a single sample is a batch too.

    With M = t − Σ_{B∈S} v_B ḡ_B, <ḡ_B, M> is the mean of <g_i, M> over the batch, so no gradient but M is ever spelt
    out, in n·C·D steps. Where S has at most C + D samples, their inner products with all others are kept instead, which
    takes no more room than the view: n·(C + D) steps for a new sample, and n·|S| for the correlations. The samples of S
    are kept in float64, all others only in the view.

    Args:
        view: the samples.
        batch: which batch each sample is in, int64 [n], all numbers from 0 up.
        target: t, float64 [C, D+1].
        capacity: the largest number of samples in S.
    """

    def __init__(self, view: HeadView, batch: Tensor, target: Tensor, capacity: int):
        self.energy = target.square().sum()
        self._view, self._batch, self._target, self._sizes = view, batch, target, batch.bincount()
        self._aim = view.project(target.to(view.features))  # <g_i, t> [n]
        self._residual = target.new_empty(capacity, target.shape[0])  # of S: (p − e_y) / |B| [·, C]
        self._features = target.new_empty(capacity, target.shape[1])  # and [h; 1] [·, D+1]
        self._places = batch.new_empty(0)  # and where in S the batch stands [·]
        self._small = capacity <= view.logits.shape[1] + view.features.shape[1]
        self._inner = self._aim.new_empty(capacity, len(view) if self._small else 0)  # with all samples [·, n]

    def __len__(self) -> int:
        return len(self._sizes)

    def correlation(self, weights: Tensor) -> Tensor:
        """<ḡ_B, M> of every batch, given v."""
        residual, features = self._chosen
        weights = weights[self._places]  # of S's samples [·]
        if self._small:
            return self._mean(self._aim - weights.to(self._aim) @ self._inner[: len(weights)])
        matrix = self._target - (residual * weights[:, None]).T @ features  # M [C, D+1]
        return self._mean(self._view.project(matrix.to(self._aim)))

    def append(self, j: int) -> tuple[Tensor, Tensor]:
        """Choose ḡ_j; return its inner products with S, itself last, and with t."""
        members, old = (self._batch == j).nonzero()[:, 0], len(self._places)
        place, rows = int(self._places[-1]) + 1 if old else 0, slice(old, old + len(members))
        self._residual[rows] = self._view.residual[members].double() / len(members)
        self._features[rows, :-1], self._features[rows, -1] = self._view.features[members].double(), 1
        self._places = torch.cat([self._places, torch.full_like(members, place)])
        if self._small:
            self._inner[rows] = self._view[members].inner(self._view) / len(members)
        residual, features = self._chosen
        inner = (residual @ residual[rows].T) * (features @ features[rows].T)  # [·, |B|]
        aim = residual[rows] * (features[rows] @ self._target.T)
        return inner.new_zeros(place + 1).index_add_(0, self._places, inner.sum(dim=1)), aim.sum()

    def keep(self, places: Tensor) -> None:
        """Drop all of S but the batches at ``places``."""
        rows = torch.isin(self._places, places).nonzero()[:, 0]
        for stored in (self._residual, self._features, self._inner):
            stored[: len(rows)] = stored[rows]
        self._places = torch.searchsorted(places, self._places[rows])

    def ranked(self, first: Tensor) -> Tensor:
        """Return all batches: ``first``, then the others by their correlation with t."""
        rest = self._mean(self._aim).index_fill(0, first, -torch.inf)
        return torch.cat([first, largest(rest, len(self) - len(first))])

    @property
    def _chosen(self) -> tuple[Tensor, Tensor]:
        return self._residual[: len(self._places)], self._features[: len(self._places)]

    def _mean(self, values: Tensor) -> Tensor:
        return values.new_zeros(len(self)).index_add_(0, self._batch, values) / self._sizes

"""GradMatch: a weighted subset whose gradient is the gradient of all samples."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.solvers import largest, matching_pursuit
from raypkg.data.coreset import Coreset

from . import coreset

BLOCK = 4096  # samples that are in float64 at a time
AHEAD = 32  # inner products computed at once: one product that reads the view, where each by itself would read it too


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
    few = budget <= view.logits.shape[1] + view.features.shape[1]  # inner products take no more room than the view
    mean = mean_gradient(view, valid, target)
    atoms = (SampleAtoms if few else BatchAtoms)(view, torch.arange(len(view)), mean, budget)
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


class BatchAtoms:
    """The mean gradients ḡ_B of disjoint batches of samples, as atoms for a target t; a single sample is a batch too.

    With M = t − Σ_{B∈S} v_B ḡ_B, <ḡ_B, M> is the mean of <g_i, M> over the batch, so no gradient but M is ever spelt
    out: n·C·D steps. The samples of S are kept in float64, all others only in the view.

    Args:
        view: the samples.
        batch: which batch each sample is in, int64 [n], all numbers from 0 up.
        target: t, float64 [C, D+1].
        capacity: the largest number of samples in S.
    """

    def __init__(self, view: HeadView, batch: Tensor, target: Tensor, capacity: int):
        self.energy = target.square().sum()
        self._view, self._batch, self._target, self._sizes = view, batch, target, batch.bincount()
        self._aim = self._mean(view.project(target.to(view.features)))  # <ḡ_B, t> of every batch
        self._residual = target.new_empty(capacity, target.shape[0])  # of S's samples: (p − e_y) / |B| [·, C]
        self._features = target.new_empty(capacity, target.shape[1])  # and [h; 1] [·, D+1]
        self._places = batch.new_empty(0)  # and where in S the batch stands [·]

    def __len__(self) -> int:
        return len(self._sizes)

    def correlation(self, weights: Tensor) -> Tensor:
        """<ḡ_B, M> of every batch, given v."""
        residual, features = self._chosen
        matrix = self._target - (residual * weights[self._places, None]).T @ features  # M [C, D+1]
        return self._mean(self._view.project(matrix.to(self._aim)))

    def append(self, j: int) -> tuple[Tensor, Tensor]:
        """Choose ḡ_j; return its inner products with S, itself last, and with t."""
        members, old = (self._batch == j).nonzero()[:, 0], len(self._places)
        place, rows = int(self._places[-1]) + 1 if old else 0, slice(old, old + len(members))
        self._residual[rows] = self._view.residual[members].double() / len(members)
        self._features[rows, :-1], self._features[rows, -1] = self._view.features[members].double(), 1
        self._places = torch.cat([self._places, torch.full_like(members, place)])
        residual, features = self._chosen
        inner = (residual @ residual[rows].T) * (features @ features[rows].T)  # [·, |B|]
        aim = residual[rows] * (features[rows] @ self._target.T)
        return inner.new_zeros(place + 1).index_add_(0, self._places, inner.sum(dim=1)), aim.sum()

    def keep(self, places: Tensor) -> None:
        """Drop all of S but the batches at ``places``."""
        rows = torch.isin(self._places, places).nonzero()[:, 0]
        for stored in (self._residual, self._features):
            stored[: len(rows)] = stored[rows]
        self._places = torch.searchsorted(places, self._places[rows])

    def ranked(self, first: Tensor) -> Tensor:
        """Return all batches: ``first``, then the others by their correlation with t."""
        rest = self._aim.index_fill(0, first, -torch.inf)
        return torch.cat([first, largest(rest, len(self) - len(first))])

    @property
    def _chosen(self) -> tuple[Tensor, Tensor]:
        return self._residual[: len(self._places)], self._features[: len(self._places)]

    def _mean(self, values: Tensor) -> Tensor:
        return values.new_zeros(len(self)).index_add_(0, self._batch, values) / self._sizes


class SampleAtoms(BatchAtoms):
    """Single samples as atoms, few of which will be chosen: their inner products with all others are kept.

    <g_j, M> = <g_j, t> − Σ_{i∈S} v_i <g_i, g_j> takes n·|S| steps. The inner products of a sample are n·(C + D) steps,
    bound by reading the view; those of the ``AHEAD`` that correlate most are computed together, and are most often
    the next to be chosen.
    """

    def __init__(self, view: HeadView, batch: Tensor, target: Tensor, capacity: int):
        super().__init__(view, batch, target, capacity)
        self._latest = self._aim  # correlation
        self._samples = batch.new_empty(0)  # S
        self._gram = self._aim.new_empty(capacity + AHEAD, len(view))  # <g_i, g_j> of some i with every j
        self._filled = 0  # rows of it
        self._row = torch.full_like(batch, -1)  # where i stands in it, if anywhere [n]

    def correlation(self, weights: Tensor) -> Tensor:
        """<g_j, M> of every sample, given v."""
        spread = self._aim.new_zeros(self._filled)
        spread[self._row[self._samples]] = weights.to(spread)
        self._latest = self._aim - spread @ self._gram[: self._filled]
        return self._latest

    def append(self, j: int) -> tuple[Tensor, Tensor]:
        """Choose g_j; return its inner products with S, itself last, and with t."""
        if self._row[j] < 0:
            self._compute(j)
        self._samples = torch.cat([self._samples, torch.tensor([j])])
        return super().append(j)

    def keep(self, places: Tensor) -> None:
        """Drop all of S but the samples at ``places``."""
        super().keep(places)
        self._samples = self._samples[places]

    def _compute(self, j: int) -> None:
        """Compute the inner products of g_j and of those that correlate most among the others."""
        if self._filled + AHEAD > len(self._gram):
            self._fill(0, self._samples, self._gram[self._row[self._samples]])
        likely = self._latest.where(self._row < 0, -torch.inf)
        likely[j] = torch.inf
        samples = likely.topk(min(AHEAD, len(likely))).indices
        self._fill(self._filled, samples, self._view[samples].inner(self._view))

    def _fill(self, start: int, samples: Tensor, gram: Tensor) -> None:
        """Replace all rows from ``start`` on."""
        self._row[self._row >= start] = -1
        self._row[samples] = start + torch.arange(len(samples))
        self._filled = start + len(samples)
        self._gram[start : self._filled] = gram

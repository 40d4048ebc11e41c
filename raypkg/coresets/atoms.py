"""Last-layer gradients as the atoms of a matching pursuit, which never asks for more than their inner products."""

import torch
from torch import Tensor

from .gradients import HeadView
from .solvers import largest

AHEAD = 32  # inner products computed at once: one product that reads the view, where each by itself would read it too


class BatchAtoms:
    """The mean gradients ḡ_B of disjoint batches of samples, as atoms for a target t; a single sample is a batch too.

    With M = t − Σ_{B∈S} v_B ḡ_B, <ḡ_B, M> is the mean of <g_i, M> over the batch, so no gradient but M is ever spelt
    out: n·C·D steps. The samples of S are kept in float64, in rows of their own; all others only in the view.

    Args:
        view: the samples.
        batch: which batch each sample is in, int64 [n], all numbers from 0 up.
        target: t, float64 [C, D+1].
        capacity: the largest number of samples in S.
    """

    def __init__(self, view: HeadView, batch: Tensor, target: Tensor, capacity: int):
        num_classes, width = target.shape  # C, D+1
        self.energy = target.square().sum()  # ‖t‖²
        self._view = view
        self._batch = batch
        self._target = target
        self._sizes = batch.bincount()  # |B|
        aims = view.project(target.to(view.features))  # <g_i, t> [n]
        self._aim = self._mean(aims)  # <ḡ_B, t> of every batch
        self._residual = target.new_empty(capacity, num_classes)  # of S's samples: (p − e_y) / |B| [·, C]
        self._features = target.new_empty(capacity, width)  # and [h; 1] [·, D+1]
        self._places = batch.new_empty(0)  # and where in S the batch of each row stands [·]

    def __len__(self) -> int:
        return len(self._sizes)

    def correlation(self, weights: Tensor) -> Tensor:
        """<ḡ_B, M> of every batch, given v."""
        residual, features = self._chosen
        weighted = residual * weights[self._places, None]
        matrix = self._target - weighted.T @ features  # M [C, D+1]
        correlations = self._view.project(matrix.to(self._aim))  # <g_i, M> [n]
        return self._mean(correlations)

    def append(self, j: int) -> tuple[Tensor, Tensor]:
        """Choose ḡ_j; return its inner products with S, itself last, and with t."""
        members = (self._batch == j).nonzero()[:, 0]
        old = len(self._places)
        place = int(self._places[-1]) + 1 if old else 0
        rows = slice(old, old + len(members))
        self._residual[rows] = self._view.residual[members].double() / len(members)
        self._features[rows, :-1] = self._view.features[members].double()
        self._features[rows, -1] = 1
        new_places = torch.full_like(members, place)
        self._places = torch.cat([self._places, new_places])

        residual, features = self._chosen
        new_residual = residual[rows]
        new_features = features[rows]
        inner = (residual @ new_residual.T) * (features @ new_features.T)  # of S's samples with those of B [·, |B|]
        by_place = inner.new_zeros(place + 1)
        by_place.index_add_(0, self._places, inner.sum(dim=1))
        aim = new_residual * (new_features @ self._target.T)
        return by_place, aim.sum()

    def keep(self, places: Tensor) -> None:
        """Drop all of S but the batches at ``places``."""
        rows = torch.isin(self._places, places).nonzero()[:, 0]
        count = len(rows)
        self._residual[:count] = self._residual[rows]
        self._features[:count] = self._features[rows]
        self._places = torch.searchsorted(places, self._places[rows])  # renumbered without gaps

    def ranked(self, first: Tensor) -> Tensor:
        """Return all batches: ``first``, then the others by their correlation with t."""
        others = self._aim.index_fill(0, first, -torch.inf)
        rest = largest(others, len(self) - len(first))
        return torch.cat([first, rest])

    @property
    def _chosen(self) -> tuple[Tensor, Tensor]:
        count = len(self._places)
        return self._residual[:count], self._features[:count]

    def _mean(self, values: Tensor) -> Tensor:
        """Return the mean over each batch of a value of each sample."""
        sums = values.new_zeros(len(self))
        sums.index_add_(0, self._batch, values)
        return sums / self._sizes


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
        self._gram = self._aim.new_empty(capacity + AHEAD, len(view))  # row i: <g_i, g_j> of one sample with every j
        self._filled = 0  # rows in use
        self._row = torch.full_like(batch, -1)  # which row is a sample's, −1 where it has none [n]

    def correlation(self, weights: Tensor) -> Tensor:
        """<g_j, M> of every sample, given v."""
        by_row = self._aim.new_zeros(self._filled)  # 0 in the rows of samples that are not in S
        by_row[self._row[self._samples]] = weights.to(by_row)
        explained = by_row @ self._gram[: self._filled]
        self._latest = self._aim - explained
        return self._latest

    def append(self, j: int) -> tuple[Tensor, Tensor]:
        """Choose g_j; return its inner products with S, itself last, and with t."""
        if self._row[j] < 0:
            self._compute(j)
        latest = torch.tensor([j])
        self._samples = torch.cat([self._samples, latest])
        return super().append(j)

    def keep(self, places: Tensor) -> None:
        """Drop all of S but the samples at ``places``."""
        super().keep(places)
        self._samples = self._samples[places]

    def _compute(self, j: int) -> None:
        """Compute the inner products of g_j and of those that correlate most among the others."""
        if self._filled + AHEAD > len(self._gram):  # no room: keep S, whose rows are needed, and drop the guesses
            rows = self._gram[self._row[self._samples]]
            self._fill(0, self._samples, rows)
        likely = self._latest.where(self._row < 0, -torch.inf)
        likely[j] = torch.inf
        count = min(AHEAD, len(likely))
        samples = likely.topk(count).indices
        gram = self._view[samples].inner(self._view)
        self._fill(self._filled, samples, gram)

    def _fill(self, start: int, samples: Tensor, gram: Tensor) -> None:
        """Replace all rows from ``start`` on."""
        end = start + len(samples)
        self._row[self._row >= start] = -1
        self._row[samples] = torch.arange(start, end)
        self._gram[start:end] = gram
        self._filled = end

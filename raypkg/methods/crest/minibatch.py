"""Mini-batch coresets: a few medoids that stand for a random subset of the data."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raypkg.coresets.distances import Distances
from raypkg.coresets.facility import cluster_shares, facility_location
from raypkg.coresets.gradients import HeadView
from raypkg.data.coreset import Coreset

from .subset import Subset


@dataclass(frozen=True, eq=False)
class Chosen:
    """A mini-batch coreset, and what choosing it showed of its random subset.

    Attributes:
        coreset: positions in the training split, with weights.
        draws: uniform numbers that augment its samples [m, d].
        loss: Σ γ_j loss_j / r of its medoids.
        losses: of all samples of the random subset [r].
        errors: by how much its mean logit gradient, and that of m random samples, miss the subset's [2, C].
    """

    coreset: Coreset
    draws: Tensor
    loss: float
    losses: Tensor
    errors: Tensor

    @property
    def samples(self) -> Subset:
        """The coreset's samples, as they are trained on."""
        return Subset(self.coreset.indices, self.draws)


def choose_minibatch(subset: Subset, logits: Tensor, y: Tensor, size: int, *, memory: int = 2**30) -> Chosen:
    """Choose the mini-batch coreset of a random subset, and measure how well it stands for the subset.

    Args:
        subset: V, in random order.
        logits: of V, float [r, C].
        y: labels of V, int64 [r].
        size: m.
        memory: bytes for cached distances.
    """
    picked = minibatch_coreset(logits, y, size, memory=memory)
    losses = F.cross_entropy(logits, y, reduction="none")  # [r]
    medoid_losses = losses[picked.indices]  # [m]
    loss = float(picked.weights @ medoid_losses) / len(picked)
    gradients = logit_gradients(logits, y).residual  # [r, C]
    weighted_sum = picked.weights @ gradients[picked.indices]  # [C]
    of_coreset = weighted_sum / len(picked)
    of_random_batch = gradients[:size].mean(dim=0)  # V is in random order, so its first m samples are a random batch
    of_subset = gradients.mean(dim=0)
    errors = torch.stack([of_coreset, of_random_batch]) - of_subset  # [2, C]
    medoids = subset[picked.indices]
    return Chosen(Coreset(medoids.indices, picked.weights), medoids.draws, loss, losses, errors)


def minibatch_coreset(logits: Tensor, y: Tensor, size: int, *, memory: int = 2**30) -> Coreset:
    """Choose the medoids of the logit gradients of r samples, and weight each by the size of its cluster.

        S = argmin Σ_{i∈V} min_{j∈S} ‖(p_i − e_i) − (p_j − e_j)‖,  |S| = m        w_j = γ_j · m/r

    by greedy facility location (arXiv:2306.01244, section 4.1), with γ_j of the r samples nearest to medoid j: the mean
    of w · loss over the medoids is Σ γ_j loss_j / r.

    Args:
        logits: of the random subset V, float [r, C].
        y: its labels, int64 [r].
        size: m; where it is r or more, all of V is returned, with weights 1.
        memory: bytes for cached distances; the medoids do not depend on it.

    Returns:
        Positions in V, in the order in which they were chosen.

    >>> minibatch_coreset(torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]]), torch.tensor([1, 1, 1]), 2)
    Coreset(indices=tensor([0, 2]), weights=tensor([1.3333, 0.6667]))
    """
    if size >= len(y):
        return Coreset.uniform(torch.arange(len(y)))
    view = logit_gradients(logits, y)
    distances = Distances(view, memory=memory)
    medoids = facility_location(distances, size)
    shares = cluster_shares(distances, medoids)  # γ_j
    weights = shares * size / len(y)  # their mean is 1, as in every coreset
    return Coreset(medoids, weights.float())


def logit_gradients(logits: Tensor, y: Tensor) -> HeadView:
    """Return the gradients with respect to the logits: those of a head without inputs, p − e_y."""
    no_features = logits.new_empty(len(y), 0)
    return HeadView(logits, no_features, y)

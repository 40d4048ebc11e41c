"""Mini-batch coresets: a few medoids that stand for a random subset of the data."""

import torch
from torch import Tensor

from raypkg.coresets.facility import cluster_shares, facility_location
from raypkg.coresets.gradients import HeadView
from raypkg.data.coreset import Coreset


def minibatch_coreset(logits: Tensor, y: Tensor, size: int, *, memory: int = 2**30) -> Coreset:
    """Choose the medoids of the logit gradients of r samples, and weigh each by the size of its cluster.

        S = argmin Σ_{i∈V} min_{j∈S} ‖(p_i − e_i) − (p_j − e_j)‖,  |S| = m        w_j = γ_j · m/r

    by greedy facility location (arXiv:2306.01244, section 4.1), with γ_j of the r samples nearest to medoid j: the mean
    of w · loss over the medoids is Σ γ_j loss_j / r.

    Args:
        logits: of the random subset V, float [r, C].
        y: its labels, int64 [r].
        size: m; where it is r or more, all of V is returned, with weights 1.
        memory: bytes for distances that are kept; the medoids do not depend on it.

    Returns:
        Positions in V, in the order of their choice.

    >>> minibatch_coreset(torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]]), torch.tensor([1, 1, 1]), 2)
    Coreset(indices=tensor([0, 2]), weights=tensor([1.3333, 0.6667]))
    """
    if size >= len(y):
        return Coreset.uniform(torch.arange(len(y)))
    view = logit_gradients(logits, y)
    medoids = facility_location(view, size, memory=memory)
    return Coreset(medoids, (cluster_shares(view, medoids) * size / len(y)).float())


def logit_gradients(logits: Tensor, y: Tensor) -> HeadView:
    """Return the gradients with respect to the logits: those of a head without inputs, p − e_y."""
    return HeadView(logits, logits.new_empty(len(y), 0), y)

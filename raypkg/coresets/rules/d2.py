"""D2 pruning: hard samples in regions of hard samples, but not many from one region."""

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from raypkg.coresets.gradients import HeadView
from raypkg.data.coreset import Coreset

from . import coreset

BLOCK = 1024  # samples whose distances to all others are in memory at a time


@coreset("d2", source="arXiv:2310.07931")
def select(
    view: HeadView,
    budget: int,
    *,
    neighbours: Annotated[int, Field(ge=1)] = 10,
    forward: Annotated[float, Field(ge=0)] = 1.0,
    reverse: Annotated[float, Field(ge=0)] = 1.0,
    relative: bool = True,
) -> Coreset:
    """Spread difficulty over a graph of nearest neighbours, then take the highest score and lower those around it.

        s_i ← s_i + Σ_{j∈N(i)} exp(−γ_f d_ij²) s_j                 once, from the difficulties s_i = ‖p_i − e_i‖
        s_j ← s_j − exp(−γ_r d_ij²) s_i,  j ∈ N(i)                 after each pick i = argmax s

    with d the distance of features and N(i) the nearest to i. A high γ_f counts difficulty alone, a high γ_r keeps
    neighbours in play.

    Args:
        view: the samples.
        budget: how many to keep.
        neighbours: size of N.
        forward: γ_f.
        reverse: γ_r.
        relative: whether d² is in units of its mean over all pairs of neighbours, so that one γ suits any features;
            false = as published.

    Differs from the paper: difficulty is the error of the view's model, where the paper has forgetting or the area
    under the margin over a whole training.
    """
    graph = _nearest(view.features, min(neighbours, len(view) - 1))
    squares = graph.squares
    if relative:
        squares = squares / squares.mean().clamp(min=torch.finfo(squares.dtype).tiny)
    difficulty = view.residual.norm(dim=1).double()
    messages = (-forward * squares).exp() * difficulty[graph.indices]  # [n, k]
    scores = difficulty + messages.sum(dim=1)
    damping = (-reverse * squares).exp()
    chosen = []
    for _ in range(budget):
        best = int(scores.argmax())
        chosen.append(best)
        around = graph.indices[best]
        scores[around] -= damping[best] * scores[best]
        scores[best] = -torch.inf  # never again: what is taken from it stays −inf
    return Coreset.uniform(torch.tensor(chosen))


class Graph(NamedTuple):
    """The nearest neighbours of each sample, int64 [n, k], and the squares of their distances, float64 [n, k]."""

    indices: Tensor
    squares: Tensor


def _nearest(features: Tensor, k: int) -> Graph:
    """Return the k nearest others of each row."""
    rows = features.double()
    indices = []
    squares = []
    for start in range(0, len(rows), BLOCK):
        distances = torch.cdist(rows[start : start + BLOCK], rows)  # [b, n]
        own = torch.arange(start, start + len(distances))
        distances[torch.arange(len(distances)), own] = torch.inf
        nearest = distances.topk(k, largest=False)
        indices.append(nearest.indices)
        squares.append(nearest.values.square())
    return Graph(torch.cat(indices), torch.cat(squares))

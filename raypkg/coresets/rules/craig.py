"""CRAIG: medoids of the gradients, weighted by the samples they stand for."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field

from raypkg.coresets.distances import Distances
from raypkg.coresets.facility import cluster_shares, facility_location, stochastic_facility_location
from raypkg.coresets.gradients import HeadView
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("craig", source="arXiv:1906.01827")
def select(
    view: HeadView,
    budget: int,
    *,
    rng: torch.Generator,
    memory: int,
    target: HeadView | None = None,
    greedy: Literal["lazy", "stochastic"] = "lazy",
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.1,
) -> Coreset:
    """Choose the medoids whose gradients are closest to all gradients, and weigh each by the size of its cluster.

        S = argmin Σ_i min_{j∈S} ‖g_i − g_j‖,  |S| = k        w_j = γ_j · k/n

    with γ_j of the n samples nearest to medoid j, so the gradient of mean(w · loss) over the medoids, Σ γ_j g_j / n,
    is within Σ_i min_{j∈S} ‖g_i − g_j‖ / n of the mean gradient of all samples. With a target, i and n are its samples:
    a medoid that none of them is nearest to weighs 0.

    Args:
        view: the samples.
        budget: k.
        rng: draws the candidates of the stochastic greedy choice.
        memory: bytes for distances that are kept; the picks do not depend on it.
        target: the samples to cover; the view itself if None.
        greedy: "lazy" takes the best medoid at every step, "stochastic" the best of ⌈n/k · ln(1/ε)⌉ random ones
            (arXiv:1409.7938).
        epsilon: ε of the stochastic choice.

    Differs from the paper: the gradients are those of the last layer; a sample equally far from several medoids counts
    in equal parts for each; the weights are divided by their mean n/k.
    """
    distances = Distances(view, target, memory=memory)
    if greedy == "lazy":
        medoids = facility_location(distances, budget)
    else:
        sample = math.ceil(len(view) / budget * math.log(1 / epsilon))  # candidates a step
        medoids = stochastic_facility_location(distances, budget, sample=sample, rng=rng)
    weights = cluster_shares(distances, medoids) * budget / len(distances.covered)  # γ · k/n
    return Coreset(medoids, weights.float())

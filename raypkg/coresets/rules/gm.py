"""Gm matching: samples whose mean is the geometric median of all, which wrong ones hardly move."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from raypkg.coresets.gradients import HeadView
from raypkg.data.coreset import Coreset

from . import coreset

CLOSE = 1e-9  # a step of the median below this share of the spread is rounding


@coreset("gm", source="arXiv:2504.00564")
def select(
    view: HeadView,
    budget: int,
    *,
    unit: bool = True,
    iterations: Annotated[int, Field(ge=1)] = 100,
) -> Coreset:
    """Herd towards the geometric median: choose so that the mean of the chosen features approaches it.

        m = argmin_z Σ_i ‖φ_i − z‖        i_t = argmax_{i∉S} <θ_t, φ_i>,   θ_0 = m,   θ_{t+1} = θ_t + m − φ_{i_t}

    Up to half of the samples may be arbitrarily wrong before the median is. With features of unit length each choice is
    the one that brings the mean of the chosen nearest to m. O(nD) time a step.

    Args:
        view: the samples.
        budget: how many to choose.
        unit: scale features to unit length, so that no sample is chosen for its length; false = as they are.
        iterations: the most that Weiszfeld's algorithm takes for the median.

    Differs from the paper: φ are the features of the view's model, where the paper has those of a large pre-trained
    encoder, and the median is that of all samples of the class, not of a random part.
    """
    features = view.features.double()
    if unit:
        features = torch.nn.functional.normalize(features, dim=1)
    median = geometric_median(features, iterations)
    aim = median.clone()  # θ
    free = torch.ones(len(view), dtype=torch.bool)
    chosen = []
    for _ in range(budget):
        alike = (features @ aim).where(free, -torch.inf)
        best = int(alike.argmax())
        free[best] = False
        chosen.append(best)
        aim = aim + median - features[best]
    return Coreset.uniform(torch.tensor(chosen))


def geometric_median(points: Tensor, iterations: int) -> Tensor:
    """Return argmin_z Σ_i ‖x_i − z‖ by Weiszfeld's algorithm, from the mean on [D].

    Each step is the mean weighted by 1 / ‖x_i − z‖, with distances of at least a rounding error so that z may be one of
    the points.
    """
    centre = points.mean(dim=0)
    spread = (points - centre).norm(dim=1).mean()
    if not spread:
        return centre
    for _ in range(iterations):
        distances = (points - centre).norm(dim=1).clamp(min=float(CLOSE * spread))
        pull = 1 / distances
        moved = pull @ points / pull.sum()
        step = (moved - centre).norm()
        centre = moved
        if step <= CLOSE * spread:
            break
    return centre

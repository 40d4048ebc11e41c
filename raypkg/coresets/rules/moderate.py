"""Moderate: keep the samples at a typical distance from the centre of their class."""

from torch import Tensor

from raypkg.coresets.gradients import HeadView
from raypkg.coresets.solvers import largest
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("moderate", source="openreview:7D5EECbOaf9")
def select(view: HeadView, budget: int) -> Coreset:
    """Keep the samples whose distance to their class centre is closest to the median of their class.

        |d_i − median_{y_j = y_i} d_j|,   d_i = ‖h_i − mean_{y_j = y_i} h_j‖

    The median of an even number is the lower of the two in the middle.
    """
    deviation = view.features.new_empty(len(view))  # [n]
    for label in view.y.unique():
        members = view.y == label
        deviation[members] = _deviation(view.features[members])
    return Coreset.uniform(largest(-deviation, budget))


def _deviation(h: Tensor) -> Tensor:
    centre = h.mean(dim=0)
    distances = (h - centre).norm(dim=1)  # d [n]
    return (distances - distances.median()).abs()

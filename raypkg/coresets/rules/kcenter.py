"""K-center: samples that leave no sample's features far from a chosen one."""

import torch
from torch import Tensor

from raypkg.coresets.gradients import HeadView
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("kcenter", source="arXiv:1708.00489")
def select(view: HeadView, budget: int) -> Coreset:
    """Take the sample farthest from all chosen ones in feature space, again and again.

        argmax_i min_{j∈S} ‖h_i − h_j‖

    starting from the sample nearest to the mean of the features. No sample is then farther from a chosen one than twice
    what the best choice of so many would leave. O(nD) time a step.

    Differs from the paper: there is no initial pool of chosen samples, and no mixed-integer program refines the greedy
    choice or sets outliers aside.
    """
    h = view.features  # [n, D]
    from_mean = _distances(h, h.mean(dim=0))
    latest = int(from_mean.argmin())
    chosen = [latest]
    nearest = _distances(h, h[latest])  # min_{j∈S} ‖h_i − h_j‖ [n]
    while len(chosen) < budget:
        nearest[latest] = -torch.inf  # never again, even where all that are left are its equals
        latest = int(nearest.argmax())
        chosen.append(latest)
        nearest = nearest.minimum(_distances(h, h[latest]))
    return Coreset.uniform(torch.tensor(chosen))


def _distances(h: Tensor, centre: Tensor) -> Tensor:
    """‖h_i − centre‖ from differences, which are 0 for equal rows, [n]."""
    distances = torch.cdist(h, centre[None], compute_mode="donot_use_mm_for_euclid_dist")  # [n, 1]
    return distances[:, 0]

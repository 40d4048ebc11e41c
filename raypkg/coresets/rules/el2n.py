"""EL2N: keep the samples with the largest error."""

from raypkg.coresets.gradients import HeadView
from raypkg.coresets.solvers import largest
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("el2n", source="arXiv:2107.07075")
def select(view: HeadView, budget: int) -> Coreset:
    """Keep the largest error norms ‖p − e_y‖.

    Differs from the paper: the scores come from the one model of the view; the paper averages them over short runs
    from several seeds.
    """
    errors = view.residual.norm(dim=1)
    return Coreset.uniform(largest(errors, budget))

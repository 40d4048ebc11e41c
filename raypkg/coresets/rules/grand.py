"""GraNd: keep the samples with the largest gradient."""

from raypkg.coresets.gradients import HeadView
from raypkg.coresets.solvers import largest
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("grand", source="arXiv:2107.07075")
def select(view: HeadView, budget: int) -> Coreset:
    """Keep the largest last-layer gradient norms ‖p − e_y‖ · sqrt(‖h‖² + 1).

    Differs from the paper: the gradient is that of the last layer, not of all parameters, and it comes from the one
    model of the view; the paper averages over short runs from several seeds.
    """
    return Coreset.uniform(largest(view.norms(), budget))

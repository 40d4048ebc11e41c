"""GraNd: keep the samples with the largest gradient, or draw them in proportion to it."""

from typing import Literal

import torch

from raypkg.coresets.gradients import HeadView
from raypkg.coresets.solvers import draw_in_proportion, largest
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("grand", source="arXiv:2107.07075")
def select(
    view: HeadView,
    budget: int,
    *,
    rng: torch.Generator,
    pick: Literal["largest", "drawn"] = "largest",
) -> Coreset:
    """Keep the largest last-layer gradient norms ‖p − e_y‖ · sqrt(‖h‖² + 1), or draw in proportion to them.

    Drawn, sample i is kept with probability π_i = min(1, c ‖g_i‖), Σ π_i = k, and weighs k / (n π_i): mean(w · loss) is
    then the mean loss of all samples in expectation. Without ``select.weighted`` every weight is 1, and the coreset
    prefers large gradients but keeps small ones too.

    Args:
        view: n samples.
        budget: k.
        rng: draws.
        pick: "largest" as published; "drawn" as the released code of LiPT seems to do.

    Differs from the paper: the gradient is that of the last layer, not of all parameters, and it comes from the one
    model of the view; the paper averages over short runs from several seeds.
    """
    norms = view.norms()
    if pick == "largest":
        return Coreset.uniform(largest(norms, budget))
    indices, probabilities = draw_in_proportion(norms, budget, rng)
    weights = budget / (len(view) * probabilities)
    return Coreset(indices, weights.float())

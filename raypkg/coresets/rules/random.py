"""Random: the honest baselines, a draw that is kept and one that is redrawn."""

import torch

from raypkg.coresets.gradients import HeadView
from raypkg.coresets.record import Record
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("random", sees="record")
def select(samples: HeadView | Record, budget: int, *, rng: torch.Generator) -> Coreset:
    """Draw samples uniformly without replacement, fixed or, stronger, redrawn (``select.every_epochs = 1``).

    A gain over the fixed draw is not one over the redrawn draw, which sees more different samples at the same cost.
    """
    order = torch.randperm(len(samples), generator=rng)
    return Coreset.uniform(order[:budget])

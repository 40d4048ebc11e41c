"""Random: the honest baseline."""

import torch

from raypkg.coresets.gradients import HeadView
from raypkg.coresets.record import Record
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("random")
def select(samples: HeadView | Record, budget: int, *, rng: torch.Generator) -> Coreset:
    """Draw samples uniformly, without replacement; anew at every epoch (``select.every = 1``) it is far stronger."""
    return Coreset.uniform(torch.randperm(len(samples), generator=rng)[:budget])

"""Random: the honest baseline."""

import torch

from raypkg.methods.coreset import Coreset
from raypkg.methods.coresets import coreset
from raypkg.methods.gradients import HeadView
from raypkg.methods.record import Record


@coreset("random")
def select(samples: HeadView | Record, budget: int, *, rng: torch.Generator) -> Coreset:
    """Draw samples uniformly, without replacement; anew at every epoch (``select.every = 1``) it is far stronger."""
    return Coreset.uniform(torch.randperm(len(samples), generator=rng)[:budget])

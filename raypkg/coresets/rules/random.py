"""Random: the honest baseline."""

import torch

from raypkg.coresets.gradients import HeadView
from raypkg.coresets.record import Record
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("random", sees="record")
def select(samples: HeadView | Record, budget: int, *, rng: torch.Generator) -> Coreset:
    """Draw samples uniformly, without replacement; far stronger anew at every epoch (``select.every_epochs = 1``)."""
    return Coreset.uniform(torch.randperm(len(samples), generator=rng)[:budget])

"""Random: the honest baseline."""

import torch

from raypkg.coresets.gradients import HeadView
from raypkg.coresets.record import Record
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("random", sees="record")
def select(samples: HeadView | Record, budget: int, *, rng: torch.Generator) -> Coreset:
    """Draw samples uniformly without replacement, once or, stronger, at every epoch (``select.every_epochs = 1``)."""
    order = torch.randperm(len(samples), generator=rng)
    return Coreset.uniform(order[:budget])

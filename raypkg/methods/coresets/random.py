"""Random: the honest baseline."""

import torch

from raypkg.methods.coreset import Coreset
from raypkg.methods.coresets import coreset
from raypkg.methods.gradients import HeadView


@coreset("random")
def select(view: HeadView, budget: int, *, rng: torch.Generator) -> Coreset:
    """Draw samples uniformly, without replacement."""
    return Coreset.uniform(torch.randperm(len(view), generator=rng)[:budget])

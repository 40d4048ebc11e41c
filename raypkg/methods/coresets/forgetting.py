"""Forgetting: keep the samples that training learned and lost most often."""

import torch

from raypkg.core.errors import UserError
from raypkg.methods.coreset import Coreset
from raypkg.methods.coresets import coreset
from raypkg.methods.record import Record
from raypkg.methods.solvers import largest


@coreset("forgetting", source="arXiv:1812.05159")
def select(record: Record, budget: int, *, rng: torch.Generator) -> Coreset:
    """Keep the samples that were forgotten most often, those never classified rightly first, ties drawn at random.

    An event is a sample classified rightly at one step and wrongly at its next.

    Raises:
        UserError: no sample has been trained on.
    """
    if not record.losses.isfinite().any():
        raise UserError("forgetting needs the record of a training that saw these samples: there is none")
    order = torch.randperm(len(record), generator=rng)
    return Coreset.uniform(order[largest(record.forgotten[order], budget)])

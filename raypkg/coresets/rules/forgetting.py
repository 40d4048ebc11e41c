"""Forgetting: keep the samples that training learned and lost most often."""

import torch

from raypkg.core.errors import UserError
from raypkg.coresets.record import Record
from raypkg.coresets.solvers import largest
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("forgetting", source="arXiv:1812.05159", sees="record")
def select(record: Record, budget: int, *, rng: torch.Generator) -> Coreset:
    """Keep the samples that were forgotten most often, those never classified rightly first, ties drawn at random.

    An event is a sample classified rightly at one step and wrongly at its next. A sample that was not trained on comes
    last.

    Raises:
        UserError: no hits were recorded, or no sample has been trained on.
    """
    seen = record.losses.isfinite()
    if record.forgotten is None or not seen.any():
        raise UserError("forgetting needs the record of a training that saw these samples: there is none")
    order = torch.randperm(len(record), generator=rng)
    return Coreset.uniform(order[largest(record.forgotten.where(seen, -1)[order], budget)])

"""Forgetting: keep the samples that training learned and lost most often."""

import torch

from raypkg.core.errors import UserError
from raypkg.coresets.record import Record
from raypkg.coresets.solvers import largest
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("forgetting", source="arXiv:1812.05159", sees="record")
def select(record: Record, budget: int, *, rng: torch.Generator) -> Coreset:
    """Keep the samples that were forgotten most often, those never classified rightly first; ties are drawn at random.

    A sample is forgotten when it is classified rightly at one step and wrongly at its next. One that was not trained on
    comes last.

    Raises:
        UserError: no hits were recorded, or no sample has been trained on.
    """
    trained = record.losses.isfinite()
    if record.forgotten is None or not trained.any():
        raise UserError("forgetting needs the record of a training that saw these samples: there is none")
    scores = record.forgotten.where(trained, -1)
    order = torch.randperm(len(record), generator=rng)  # equal scores go by position, here a random one
    picked = largest(scores[order], budget)
    return Coreset.uniform(order[picked])

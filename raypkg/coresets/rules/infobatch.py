"""InfoBatch: skip half of the well-learned samples at every epoch and count the other half twice."""

from typing import Annotated

import torch
from pydantic import Field

from raypkg.coresets.record import Record
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("infobatch", source="arXiv:2303.04947", sees="record", sizes_itself=True)
def select(
    record: Record,
    *,
    rng: torch.Generator,
    progress: float = 0.0,
    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    until: Annotated[float, Field(ge=0, le=1)] = 0.875,
) -> Coreset:
    """Drop each sample whose loss is below the mean with probability r, and weigh those that stay by 1 / (1 − r).

    So Σ w_i ∇ℓ_i over the kept samples is Σ ∇ℓ_i over all of them in expectation. A sample without a loss yet is
    kept. It keeps as many samples as it sees fit, and is meant to act anew at every epoch.

    Args:
        record: the losses are those of each sample's latest step.
        rng: of this epoch.
        progress: share of the training that is done, in [0, 1].
        ratio: r.
        until: the progress δ from which all samples are kept, so that training ends on the unpruned data.
    """
    everyone = torch.arange(len(record))
    known = record.losses.isfinite()
    if progress >= until or not known.any():
        return Coreset.uniform(everyone)
    mean = record.losses[known].double().mean()
    learned = record.losses < mean  # [n]
    lucky = torch.rand(len(record), generator=rng) >= ratio
    kept = ~learned | lucky
    weights = torch.where(learned, 1 / (1 - ratio), 1.0)
    return Coreset(everyone[kept], weights[kept])

"""By a threshold: only weights that have become tiny go."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from . import drop


@drop("threshold")
def score(weight: Tensor, *, below: Annotated[float, Field(gt=0)] = 1e-3) -> Tensor:
    """Drop |w| < ``below``, the smallest first, and no more than the schedule allows."""
    magnitude = weight.abs()
    return magnitude.where(magnitude < below, torch.inf)

"""Everything that a checkpoint holds of CREST."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .active import ActiveSamples
from .pool import Pool
from .quadratic import MovingMoments
from .region import Region


@dataclass(eq=False)
class CrestState:
    """Where CREST is in the paper's loop, and what it has done so far.

    Attributes:
        samples: which are active, and their recorded losses.
        region: the local model of the loss.
        counts: steps that trained on each sample, int32 [n].
        pool: from which training draws; None before the first step.
        coming: the next pool, chosen while training continues on the expired one.
        picked: (update, sample) of every choice, each int32 [2, ·].
        history: a row for every check.
        looks: a row for every look at what coresets are worth.
        said: what the looks found, in words.
    """

    samples: ActiveSamples
    region: Region
    counts: Tensor
    pool: Pool | None = None
    coming: Pool | None = None
    picked: list[Tensor] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    looks: list[dict[str, float]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    @classmethod
    def initial(cls, indices: Tensor, *, order: int, smoothed: bool) -> CrestState:
        """Return the state before the first step: all of these samples active, and no model that is trusted."""
        samples = ActiveSamples.all_of(indices)
        counts = torch.zeros(len(samples.active), dtype=torch.int32)
        return cls(samples, Region.none_yet(order, smoothed=smoothed), counts)

    @property
    def updates(self) -> int:
        """How many pools there have been."""
        newest = self.coming or self.pool
        return newest.update if newest else 0

    def saved(self) -> dict[str, Any]:
        """Return the fields, and those of the parts, as tensors and plain values."""
        return asdict(self)

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> CrestState:
        """Return the state whose fields were saved."""
        values = deepcopy(dict(saved))  # losses and counts change in place
        region = values["region"]
        values["samples"] = ActiveSamples(**values["samples"])
        values["region"] = Region(**{**region, "moments": MovingMoments(**region["moments"])})
        values["pool"] = values["pool"] and Pool.restored(values["pool"])
        values["coming"] = values["coming"] and Pool.restored(values["coming"])
        return cls(**values)

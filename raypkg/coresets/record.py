"""What training keeps of its samples anyway: selecting by it needs no forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raypkg.core.errors import UserError


@dataclass(frozen=True, eq=False)
class Record:
    """Each sample's latest training loss, and how often it was forgotten.

    Args:
        y: labels, int64 [n].
        losses: cross-entropy at the sample's latest step, float32 [n]; +inf where it was never trained on.
        forgotten: how often a sample classified rightly was classified wrongly the next time, float32 [n]; +inf where
            it was never classified rightly. None where hits were not recorded.

    Raises:
        UserError: shapes do not fit, or a number is NaN.
    """

    y: Tensor
    losses: Tensor
    forgotten: Tensor | None = None

    def __post_init__(self):
        self._check("losses", self.losses)
        if self.forgotten is not None:
            self._check("forgotten", self.forgotten)

    def _check(self, name: str, values: Tensor) -> None:
        if values.shape == self.y.shape and not values.isnan().any():
            return
        shape = list(values.shape)
        raise UserError(f"record of {len(self.y)} samples: {name} {shape} must be [n] without NaN")

    @classmethod
    def empty(cls, y: Tensor) -> "Record":
        """Return the record of samples that no training has seen."""
        return cls(y, torch.full(y.shape, torch.inf))

    @classmethod
    def joined(cls, records: Sequence["Record"]) -> "Record":
        """Join the records, with hits, of trainings that saw disjoint samples of the same n."""
        # a training that did not see a sample has +inf there, so the least is what the one that saw it recorded
        losses = [record.losses for record in records]
        forgotten = [record.forgotten for record in records if record.forgotten is not None]
        return cls(
            y=records[0].y,
            losses=torch.stack(losses).amin(dim=0),
            forgotten=torch.stack(forgotten).amin(dim=0),
        )

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, indices: Tensor) -> "Record":
        forgotten = None if self.forgotten is None else self.forgotten[indices]
        return Record(self.y[indices], self.losses[indices], forgotten)

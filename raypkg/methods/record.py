"""What training has seen of its samples anyway: no forward pass is needed to select by it."""

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
            it was never classified rightly.

    Raises:
        UserError: shapes do not fit, or a number is NaN.
    """

    y: Tensor
    losses: Tensor
    forgotten: Tensor

    def __post_init__(self):
        if not self.y.shape == self.losses.shape == self.forgotten.shape or self.y.dim() != 1:
            shapes = f"y {list(self.y.shape)}, losses {list(self.losses.shape)}"
            raise UserError(f"record of {shapes}, forgotten {list(self.forgotten.shape)}: expected [n] three times")
        if (self.losses.isnan() | self.forgotten.isnan()).any():
            raise UserError("record of training: a loss or a count is NaN")

    @classmethod
    def empty(cls, y: Tensor) -> "Record":
        """Return the record of samples that no training has seen."""
        nothing = torch.full(y.shape, torch.inf)
        return cls(y, nothing, nothing)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, indices: Tensor) -> "Record":
        return Record(self.y[indices], self.losses[indices], self.forgotten[indices])

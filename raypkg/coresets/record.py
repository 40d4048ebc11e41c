"""What training keeps of its samples anyway: selecting by it needs no forward pass."""

from dataclasses import dataclass

import torch
from torch import Tensor

from raypkg.core.errors import UserError


@dataclass(frozen=True, eq=False)
class Record:
    """Each sample's latest training loss, how often it was forgotten, and the area under its margin.

    The margin of a step is the log-odds of the label, ln p_y / (1 − p_y) = z_y − ln Σ_{c≠y} exp z_c: the logit of the
    label above those of all other classes together. It follows from the loss ℓ = −ln p_y, which training has anyway.

    Args:
        y: labels, int64 [n].
        losses: cross-entropy at the sample's latest step, float32 [n]; +inf where it was never trained on.
        forgotten: how often a sample classified rightly was classified wrongly the next time, float32 [n]; +inf where
            it was never classified rightly. None where hits were not recorded.
        margins: the mean margin over the epochs that the sample was trained in (area under the margin), float32 [n];
            +inf where it was never trained on. None where it was not recorded.

    Differs from the paper (arXiv:2001.10528): its margin is to the largest other logit, which is up to ln (C − 1)
    above this one; and no margin exceeds about 16, where a loss in float32 is 0.

    Raises:
        UserError: shapes do not fit, or a number is NaN.
    """

    y: Tensor
    losses: Tensor
    forgotten: Tensor | None = None
    margins: Tensor | None = None

    def __post_init__(self):
        self._check("losses", self.losses)
        if self.forgotten is not None:
            self._check("forgotten", self.forgotten)
        if self.margins is not None:
            self._check("margins", self.margins)

    def _check(self, name: str, values: Tensor) -> None:
        if values.shape == self.y.shape and not values.isnan().any():
            return
        shape = list(values.shape)
        raise UserError(f"record of {len(self.y)} samples: {name} {shape} must be [n] without NaN")

    @classmethod
    def empty(cls, y: Tensor) -> "Record":
        """Return the record of samples that no training has seen."""
        return cls(y, torch.full(y.shape, torch.inf))

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, indices: Tensor | slice) -> "Record":
        forgotten = None if self.forgotten is None else self.forgotten[indices]
        margins = None if self.margins is None else self.margins[indices]
        return Record(self.y[indices], self.losses[indices], forgotten, margins)


def margins_of(losses: Tensor) -> Tensor:
    """Return the margin ln p_y / (1 − p_y) of each loss −ln p_y, one of 0 as if it were the least above 0 in float32.

    >>> margins_of(torch.tensor([0.1, 2.0, 100.0]))
    tensor([   2.2522,   -1.8546, -100.0000])
    """
    exact = losses.double().clamp(min=torch.finfo(torch.float32).eps)
    others = -torch.expm1(-exact)  # 1 − p_y
    return (-exact - others.log()).float()

"""The Coreset: indices of the samples to train on, and their weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raypkg.core.errors import UserError


@dataclass(frozen=True, eq=False)
class Coreset:
    """A weighted subset; the training objective on it is mean(w · loss), so weight 1 means unweighted.

    Raises:
        UserError: wrong dtype or shape, repeated or negative index, negative or non-finite weight.

    >>> Coreset.uniform(torch.tensor([4, 7])).weights
    tensor([1., 1.])
    """

    indices: Tensor  # int64 [k], distinct
    weights: Tensor  # float32 [k]

    def __post_init__(self):
        for what, vector, dtype in (("indices", self.indices, torch.int64), ("weights", self.weights, torch.float32)):
            if vector.dim() != 1 or vector.dtype != dtype:
                raise UserError(f"coreset {what} are {vector.dtype} {list(vector.shape)}, expected {dtype} [k]")
        if len(self.indices) != len(self.weights):
            raise UserError(f"coreset has {len(self.indices)} indices and {len(self.weights)} weights, not as many")
        distinct, times = self.indices.unique(return_counts=True)
        usable = self.weights.isfinite() & (self.weights >= 0)
        for what, values, valid, allowed in (
            ("index", self.indices, self.indices >= 0, "0 or more"),
            ("weight", self.weights, usable, "finite and 0 or more"),
            ("index", distinct, times == 1, "given once"),
        ):
            if not valid.all():
                raise UserError(f"coreset {what} {values[~valid][0].item()}: must be {allowed}")

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def uniform(cls, indices: Tensor) -> "Coreset":
        """Return an unweighted coreset."""
        return cls(indices, torch.ones(len(indices)))

    @classmethod
    def concat(cls, parts: Sequence["Coreset"]) -> "Coreset":
        """Join coresets of disjoint samples, such as one per class, in the given order."""
        if not parts:
            return cls.uniform(torch.empty(0, dtype=torch.int64))
        return cls(torch.cat([part.indices for part in parts]), torch.cat([part.weights for part in parts]))

    def at(self, positions: Tensor) -> "Coreset":
        """Map picks within a part of the data to the whole: local index i becomes ``positions[i]``.

        >>> Coreset.uniform(torch.tensor([0, 2])).at(torch.tensor([10, 20, 30])).indices
        tensor([10, 30])
        """
        return Coreset(positions[self.indices], self.weights)

    def part(self, positions: Tensor) -> "Coreset":
        """Return the samples at distinct positions, such as a batch, without validating them again.

        >>> Coreset.uniform(torch.tensor([4, 7, 9])).part(torch.tensor([2, 0])).indices
        tensor([9, 4])
        """
        part = object.__new__(Coreset)  # validation would take longer than gathering a batch of rows
        vars(part).update(indices=self.indices[positions], weights=self.weights[positions])
        return part

"""Coreset: which samples to train on, and how much each one counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raypkg.core.errors import UserError


@dataclass(frozen=True, eq=False)
class Coreset:
    """A weighted subset; the training objective on it is mean(w · loss), and 1 means unweighted.

    Args:
        indices: int64 [k], distinct and not negative.
        weights: float32 [k], finite and not negative.

    Raises:
        UserError: wrong dtype or shape, repeated or negative index, negative or non-finite weight.

    >>> Coreset.uniform(torch.tensor([4, 7])).weights
    tensor([1., 1.])
    """

    indices: Tensor
    weights: Tensor

    def __post_init__(self):
        _check_vector("indices", self.indices, torch.int64)
        _check_vector("weights", self.weights, torch.float32)
        if len(self.indices) != len(self.weights):
            raise UserError(f"coreset has {len(self.indices)} indices and {len(self.weights)} weights, not as many")
        _check_each("index", self.indices, self.indices >= 0, "0 or more")
        usable = self.weights.isfinite() & (self.weights >= 0)
        _check_each("weight", self.weights, usable, "finite and 0 or more")
        distinct, times = self.indices.unique(return_counts=True)
        _check_each("index", distinct, times == 1, "given once")

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
        indices = torch.cat([part.indices for part in parts])
        weights = torch.cat([part.weights for part in parts])
        return cls(indices, weights)

    def at(self, positions: Tensor) -> "Coreset":
        """Map picks within a part of the data to the whole: local index i becomes ``positions[i]``.

        >>> Coreset.uniform(torch.tensor([0, 2])).at(torch.tensor([10, 20, 30])).indices
        tensor([10, 30])
        """
        return Coreset(positions[self.indices], self.weights)

    def part(self, positions: Tensor) -> "Coreset":
        """Return the samples at distinct positions, such as a batch; what was checked is not checked again.

        >>> Coreset.uniform(torch.tensor([4, 7, 9])).part(torch.tensor([2, 0])).indices
        tensor([9, 4])
        """
        part = object.__new__(Coreset)  # the checks would take longer than to gather a batch of rows
        vars(part).update(indices=self.indices[positions], weights=self.weights[positions])
        return part


def _check_vector(what: str, vector: Tensor, dtype: torch.dtype) -> None:
    if vector.dim() != 1 or vector.dtype != dtype:
        raise UserError(f"coreset {what} are {vector.dtype} {list(vector.shape)}, expected {dtype} [k]")


def _check_each(what: str, values: Tensor, good: Tensor, allowed: str) -> None:
    if not good.all():
        first = values[~good][0].item()
        raise UserError(f"coreset {what} {first}: must be {allowed}")

"""Merging models that started from the same weights into one (model soup, arXiv:2203.05482, with masks)."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from raypkg.methods.sparse.masks import Masks

State = Mapping[str, Tensor]  # floating-point parameters by name
Total = Callable[[Tensor], Tensor]  # sums a tensor over all workers


class Member(NamedTuple):
    """A model that trained by itself.

    Attributes:
        parameters: its last ones.
        masks: that it trained under; empty = dense.
    """

    parameters: State
    masks: Masks

    @property
    def nbytes(self) -> int:
        """Bytes that it takes to send."""
        tensors = [*self.parameters.values(), *self.masks.values()]
        return sum(tensor.nbytes for tensor in tensors)


def alone(sums: Tensor) -> Tensor:
    """Return the sum over all workers where there is but one."""
    return sums


class Soup:
    """A running sum of models; sums of several soups add up, so one all-reduce merges those of all workers.

    w = Σ_i m_i ⊙ w_i / Σ_i m_i, and weights in no mask keep their initial value w0. Parameters that no mask names
    (biases, norms) are averaged plainly.

    Args:
        initial: w0, the parameters that all models started from.
        members: the first models in it.
    """

    def __init__(self, initial: State, members: Iterable[Member] = ()):
        self.initial = initial
        self.sizes = [w.numel() for w in initial.values()]
        # Σ m⊙w and Σ m, all parameters in a row; in float64 the order of the models does not show in float32
        self.sums = torch.zeros(2, sum(self.sizes), dtype=torch.float64)
        for member in members:
            self.add(member)

    def add(self, member: Member) -> None:
        """Stir in one model; without masks it counts everywhere."""
        everywhere = {name: torch.ones_like(w) for name, w in self.initial.items()}
        mask = self._flat({**everywhere, **member.masks})  # [p]
        weights = self._flat(member.parameters)  # [p]
        self.sums[0] += mask * weights
        self.sums[1] += mask

    def merged(self, total: Total = alone) -> dict[str, Tensor]:
        """Return the merged parameters; ``total`` sums the [2, p] float64 tensor over the workers."""
        weighted, count = total(self.sums.clone())
        mean = weighted / count.clamp_min(1)  # where the count is 0, so is the sum
        start = self._flat(self.initial)
        values = torch.where(count > 0, mean, start)
        pieces = values.split(self.sizes)
        merged = {}
        for (name, like), piece in zip(self.initial.items(), pieces, strict=True):
            merged[name] = piece.view(like.shape).to(like)
        return merged

    def _flat(self, state: State) -> Tensor:
        """Return all parameters in a row, float64 [p]."""
        rows = []
        for name in self.initial:
            values = state[name].detach().cpu().double()
            rows.append(values.flatten())
        return torch.cat(rows)

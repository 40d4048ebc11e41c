"""Distances between gradients, kept as far as memory allows and computed again where it does not."""

from collections.abc import Iterator

import torch
from torch import Tensor

from raypkg.core.errors import UserError

from .gradients import HeadView

PRODUCT = 128  # rows that one matrix product computes; always that many, because another shape may round otherwise
FEW = 32  # rows asked for at once where all are kept: a step of the greedy choice rarely needs more


class Distances:
    """Rows of the distances ‖g_i − g_j‖ [n, m], one for each j: as many as fit in ``memory`` bytes are kept.

    They are kept from the first on.

    Args:
        view: n samples to choose from.
        covered: m samples i to be close to; None = the view.
        memory: bytes for the distances that are kept; no distance depends on it.

    Attributes:
        batch: how many to ask for at once; where some are missing, a whole product of them costs no more than one.

    Raises:
        UserError: memory out of range.
    """

    def __init__(self, view: HeadView, covered: HeadView | None = None, *, memory: int):
        if memory < 0:
            raise UserError(f"memory {memory} bytes: must be 0 or more")
        covered = view if covered is None else covered
        n = len(view)
        m = len(covered)
        row_bytes = m * view.logits.element_size()
        room = min(memory // row_bytes, n)
        self._complete = room == n
        self.batch = FEW if self._complete else PRODUCT
        self.view = view
        self.covered = covered
        self._kept = view.logits.new_empty(room, m)
        symmetric = covered is view
        for first, end in _blocks(0, room):
            start = first if symmetric else 0
            block = self._block(first, end, start)
            self._kept[first:end, start:] = block
            if symmetric:  # what later rows begin with
                self._kept[end:, first:end] = block[:, end - first : room - first].T

    def __call__(self, samples: Tensor) -> Tensor:
        """Return the distances of at most PRODUCT samples to all that are covered, [b, m]."""
        if self._complete:
            return self._kept.index_select(0, samples)
        kept = samples < len(self._kept)
        rows = self._kept.new_empty(len(samples), len(self.covered))
        rows[kept] = self._kept[samples[kept]]
        missing = samples[~kept]
        if len(missing):
            rows[~kept] = self._computed(missing)
        return rows

    def blocks(self) -> Iterator[Tensor]:
        """Yield all rows in order, PRODUCT or fewer at a time."""
        yield from self._kept.split(PRODUCT)
        for first, end in _blocks(len(self._kept), len(self.view)):
            yield self._block(first, end)

    def _block(self, first: int, end: int, start: int = 0) -> Tensor:
        """Return the rows from ``first`` to ``end``, of the samples covered from ``start`` on."""
        if end - first < PRODUCT:
            samples = torch.arange(first, end)
            return self._computed(samples, start)
        block = self.view[first:end]  # no copy, unlike by positions
        return block.distances(self._from(start))

    def _computed(self, samples: Tensor, start: int = 0) -> Tensor:
        """Return the distances to all that are covered from ``start`` on."""
        # filled up with the first one to the one shape of all products: a distance is then the same number each time
        filling = samples[:1].expand(PRODUCT - len(samples))
        padded = torch.cat([samples, filling])
        distances = self.view[padded].distances(self._from(start))
        return distances[: len(samples)]

    def _from(self, start: int) -> HeadView:
        """Return the covered samples from ``start`` on."""
        return self.covered[start:] if start else self.covered  # which keeps what is computed of all of it


def _blocks(start: int, end: int) -> Iterator[tuple[int, int]]:
    for first in range(start, end, PRODUCT):
        last = min(first + PRODUCT, end)
        yield first, last

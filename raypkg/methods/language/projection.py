"""Random projection by signs, generated where they are used: no p × d matrix exists."""

import numpy as np
import torch
from torch import Tensor

from raypkg.core.seeds import derive

AT_ONCE = 1 << 19  # signs in memory at a time: few enough to stay in a processor's cache
BITS = 256  # of one count of the generator: four words of 64


class Projection:
    """The map g → g R / sqrt(d) with R ∈ {−1, 1}^{p × d} (Rademacher), by which E <g R, h R> / d = <g, h>.

    The signs of coordinate i are bits of Philox, whose counter begins at i ⌈d/256⌉: they depend on (seed, i) alone.

    >>> projection = Projection(seed=0, width=4096)
    >>> rows = projection(torch.tensor([[3.0, 4.0], [4.0, -3.0]]))
    >>> bool(((rows @ rows.T - 25 * torch.eye(2)).abs() < 2).all())
    True
    """

    def __init__(self, seed: int, width: int, at_once: int = AT_ONCE):
        self.width = width  # d
        self.at_once = at_once
        self._key = derive(seed, "projection")
        self._counts = -(-width // BITS)  # of the generator's counter per coordinate
        # The eight signs of each byte, its lowest bit first [256, 8].
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        self._table = bits.astype(np.float32) * 2 - 1

    def __call__(self, gradients: Tensor, start: int = 0) -> Tensor:
        """Return the projection of coordinates from ``start`` on, float [b, m] → [b, d]; those of parts add up."""
        projected = gradients.new_zeros(len(gradients), self.width)
        size, octets = max(1, self.at_once // self.width), -(-self.width // 8)
        # One buffer for all blocks: allocating memory would take longer than filling it.
        buffer = np.empty((size, octets, 8), np.float32)
        for first in range(0, gradients.shape[1], size):
            part = gradients[:, first : first + size]
            count = part.shape[1]
            philox = np.random.Philox(key=self._key, counter=(start + first) * self._counts)
            words = philox.random_raw(count * self._counts * (BITS // 64))
            signs_of = words.astype("<u8", copy=False).view(np.uint8).reshape(count, -1)[:, :octets]
            np.take(self._table, signs_of, axis=0, out=buffer[:count], mode="clip")
            signs = torch.from_numpy(buffer[:count]).flatten(1)[:, : self.width]  # rows of R
            projected.addmm_(part, signs.to(part))
        return projected / self.width**0.5

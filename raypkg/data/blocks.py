"""Samples that are read by blocks: where they lie, an order in which few blocks are needed at a time, and copies."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from raypkg.core.seeds import generator

Take = Callable[[np.ndarray], np.ndarray]
SPARE = 16  # blocks that are held beyond those that are needed: they come and go in no strict order


@dataclass(frozen=True)
class Blocks:
    """How the samples of a split lie in blocks, of which a machine reads whole ones only.

    Attributes:
        of: the block of each sample, int64 [n].
        window: blocks from which the batches of training draw at any time.
        copied: copies samples, int64 [m] ascending, to this machine, and takes 0 … m−1 of them.
        hold: has so many blocks held in memory.
    """

    of: Tensor
    window: int
    copied: Callable[[np.ndarray], Take]
    hold: Callable[[int], None]

    def hold_for(self, positions: Tensor, batch_size: int, ahead: int, world: int) -> None:
        """Have as many blocks held as one worker's batches need, so that none is fetched twice while it is needed.

        Args:
            positions: samples of an epoch, int64 [n].
            batch_size: of all workers.
            ahead: batches that are loaded at once.
            world: workers, each of which needs its share of the window.

        Raises:
            UserError: they do not fit the memory.
        """
        blocks = len(self.of[positions].unique())
        new = math.ceil(batch_size * blocks / len(positions))  # blocks by which a batch moves the window on
        share = math.ceil(self.window / world)
        self.hold(share + ahead * new + SPARE)

    def at(self, positions: Tensor) -> "Blocks":
        """Return the blocks of the samples at some positions."""
        rows = positions.numpy()

        def copied(indices: np.ndarray) -> Take:
            held, place = np.unique(rows[indices], return_inverse=True)  # a sample may stand at several positions
            take = self.copied(held)
            return lambda chosen: take(place[chosen])

        return replace(self, of=self.of[positions], copied=copied)


def shuffled_by_blocks(of: Tensor, window: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Return which samples are in each batch of an epoch, so that only ``window`` blocks are needed at a time.

    The block at place p of a random order of the B blocks gives its samples at the times (p + W·u) mod B, with W blocks
    in the window and u uniform in [0, 1). At any time W blocks give samples, each as many as the others; with W = B
    the order is a uniform permutation. Within a batch, samples stand by a random number of their block: the slice of a
    worker then comes from few of the W blocks, and from the same ones as long as these are in the window.

    Args:
        of: the block of each sample, int64 [n].
        window: W, at most B are of use.
        batch_size: the batches are at most so large, and as even as possible.
        seed: of the run.
        epoch: its number.

    >>> batches = shuffled_by_blocks(torch.arange(100) // 10, 2, 20, seed=0, epoch=1)
    >>> [len(batch) for batch in batches], int(torch.cat(batches).unique().numel())
    ([20, 20, 20, 20, 20], 100)
    """
    rng = generator(seed, "shuffle", epoch)
    blocks, block = of.unique(return_inverse=True)
    count = len(blocks)  # B
    place = torch.randperm(count, generator=rng)[block]  # p
    u = torch.rand(len(of), generator=rng, dtype=torch.float64)
    time = (place + min(window, count) * u) % count
    holder = torch.randperm(count, generator=rng)[block]
    batches = time.argsort(stable=True).tensor_split(-(-len(of) // batch_size))
    return tuple(batch[holder[batch].argsort(stable=True)] for batch in batches)

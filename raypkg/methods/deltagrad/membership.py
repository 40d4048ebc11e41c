"""Which sample has a place in which batch of a recorded training."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import Tensor

from raypkg.core.seeds import generator
from raypkg.engine.batches import shuffled


@dataclass(frozen=True)
class Membership:
    """Which samples are in which batch, of all that were ever in the training.

    The samples of the first training have the places that the loop gave them; those added later, group by group, are
    drawn a batch for each epoch. A place belongs to its sample for good: added back after a deletion, it returns there.

    Attributes:
        trained: samples of the first training, int64 [n].
        added: groups of later ones.
        batch_size: of the first training.
        seed: names every draw.
    """

    trained: Tensor
    added: tuple[Tensor, ...]
    batch_size: int
    seed: int

    def batches(self, steps: int) -> Iterator[Tensor]:
        """Yield all samples with a place in the batch of each step, deleted ones too."""
        return islice(self._endless(), steps)

    def epoch(self, epoch: int) -> list[Tensor]:
        """Return all samples with a place in each batch of an epoch, deleted ones too."""
        parts = shuffled(len(self.trained), self.batch_size, self.seed, epoch)
        batches = [self.trained[part] for part in parts]
        for number, group in enumerate(self.added):
            rng = generator(self.seed, "added", number, epoch)
            places = torch.randint(len(batches), (len(group),), generator=rng)  # [group], a batch for each sample
            for place, batch in enumerate(batches):
                batches[place] = torch.cat([batch, group[places == place]])
        return batches

    def _endless(self) -> Iterator[Tensor]:
        for epoch in count():
            yield from self.epoch(epoch)

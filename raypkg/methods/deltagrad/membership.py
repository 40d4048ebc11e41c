"""Who has a place in which batch of a recorded training."""

from dataclasses import dataclass

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

    def places(self, epoch: int) -> list[Tensor]:
        """Return everyone with a place in each batch of an epoch, whether or not it is in use."""
        batches = [self.trained[part] for part in shuffled(len(self.trained), self.batch_size, self.seed, epoch)]
        for number, group in enumerate(self.added):
            rng = generator(self.seed, "added", number, epoch)
            drawn = torch.randint(len(batches), (len(group),), generator=rng)
            batches = [torch.cat([batch, group[drawn == place]]) for place, batch in enumerate(batches)]
        return batches

"""Samples with the random numbers that augment them: selection, checks and training see the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from raypkg.data.augment import compose
from raypkg.data.split import Split


@dataclass(frozen=True, eq=False)
class Subset:
    """Samples of the training split, as they are trained on.

    Attributes:
        indices: positions in the training split, int64 [r].
        draws: uniform numbers that augment each sample, [r, d]; d is 0 where nothing is augmented.
    """

    indices: Tensor
    draws: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, positions: Tensor | slice) -> Subset:
        return Subset(self.indices[positions], self.draws[positions])

    @classmethod
    def drawn(cls, indices: Tensor, augment: Sequence[str], rng: torch.Generator) -> Subset:
        """Draw what the named augmentations take for each of the samples."""
        uniforms = compose(augment).draws
        return cls(indices, torch.rand(len(indices), uniforms, generator=rng))

    @classmethod
    def concat(cls, subsets: Sequence[Subset]) -> Subset:
        """Join subsets in their order; a sample may be in several, augmented differently."""
        indices = [subset.indices for subset in subsets]
        draws = [subset.draws for subset in subsets]
        return cls(torch.cat(indices), torch.cat(draws))

    def split(self, whole: Split, augment: Sequence[str]) -> Split:
        """Return the samples as a split of their own, in which sample i is augmented by row i of the draws.

        Args:
            whole: the training split.
            augment: names of the augmentations that the draws are for.

        >>> images = torch.arange(4, dtype=torch.uint8).view(2, 1, 1, 2)
        >>> whole = Split.from_tensors(images, torch.tensor([0, 1]))
        >>> twice = Subset(torch.tensor([1, 1]), torch.tensor([[0.9], [0.1]]))
        >>> twice.split(whole, ["flip"]).batch([0, 1])[0].flatten().tolist()
        [2, 3, 3, 2]
        """
        if not self.draws.shape[1]:
            return self._unchanged(whole)
        change = compose(augment)

        def take(rows: np.ndarray) -> np.ndarray:
            wanted = torch.from_numpy(rows)
            images, _ = whole.batch(self.indices[wanted])
            changed = change(images, self.draws[wanted])  # [b, C, H, W]
            return changed.permute(0, 2, 3, 1).numpy()  # as a split stores images

        return replace(self._unchanged(whole), take=take)

    def _unchanged(self, whole: Split) -> Split:
        indices = self.indices.numpy()
        return replace(whole, take=lambda rows: whole.take(indices[rows]), y=whole.y[self.indices], ids=None)

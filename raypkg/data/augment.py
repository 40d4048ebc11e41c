"""Per-sample augmentation of whole batches: image tensors and a matrix of uniform numbers in, images out.

Nothing here draws: sample i is changed by row i of ``u`` alone, so a worker that holds a slice of a batch changes it as
the whole batch would have been.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raypkg.core.errors import UserError, unknown

from .operations import OPERATIONS

Change = Callable[[Tensor, Tensor], Tensor]  # (uint8 [b, C, H, W], uniforms [b, draws]) → uint8 [b, C, H, W]


@dataclass(frozen=True)
class Augmentation:
    """A change of images and how many uniform numbers it takes for each of them."""

    draws: int
    change: Change

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        """Change uint8 images [b, C, H, W] by uniforms [b, draws]."""
        return self.change(x, u)


def compose(names: Sequence[str]) -> Augmentation:
    """Return the named augmentations as one, in the given order; without names, the one that changes nothing.

    Raises:
        UserError: an unknown name; or, when applied, samples that are rows of a table and not images.
    """
    strange = next((name for name in names if name not in AUGMENTATIONS), None)
    if strange is not None:
        raise unknown("augmentation", strange, AUGMENTATIONS)
    steps = [AUGMENTATIONS[name] for name in names]
    draws = [step.draws for step in steps]

    def change(x: Tensor, u: Tensor) -> Tensor:
        if steps and x.dim() != 4:
            raise UserError(
                f"samples of shape {list(x.shape[1:])} are no images: leave out {', '.join(names)}"
                " (dataset.augment, pretrain.randaugment)"
            )
        # Each step takes the columns of u that follow those of the step before it.
        for step, uniforms in zip(steps, u.split(draws, dim=1), strict=True):
            x = step(x, uniforms)
        return x

    return Augmentation(sum(draws), change)


def crop(x: Tensor, u: Tensor) -> Tensor:
    """Shift each image within a black border of side // 8 and cut its size out again, at an offset drawn for it."""
    b, c, height, width = x.shape
    border = max(1, width // 8)
    pixels = x.permute(0, 2, 3, 1)  # [b, H, W, C], as they lie in memory
    padded = F.pad(pixels, (0, 0, border, border, border, border)).contiguous()  # [b, H', W', C]
    image = padded.stride(0) // c  # pixels from one image to the next
    line = padded.stride(1) // c  # pixels from one line to the next
    top, left = (u * (2 * border + 1)).long().unbind(1)  # [b]
    corner = torch.arange(b, device=x.device) * image + top * line + left  # [b]
    lines = torch.arange(height, device=x.device) * line  # [H]
    start = corner[:, None] + lines  # [b, H], the pixel where each line of the result begins
    # A view with a row for every pixel: the W pixels from there on. The rows overlap in memory, which costs nothing;
    # picking one row copies one line of the result, so the whole crop is a single index_select.
    every_start = max(b * image - width + 1, 0)
    stretches = padded.as_strided((every_start, width * c), (c, 1))
    cut = stretches.index_select(0, start.view(-1))  # [b·H, W·C]
    return cut.view(b, height, width, c).permute(0, 3, 1, 2)


def flip(x: Tensor, u: Tensor) -> Tensor:
    """Mirror each image left to right with probability ½."""
    pixels = x.permute(0, 2, 3, 1)  # [b, H, W, C]
    # Mirroring all and copying whole images is faster than touching single pixels of some.
    both = torch.cat([pixels, pixels.flip(2)])  # [2·b, H, W, C]
    mirrored = u[:, 0] < 0.5
    chosen = torch.arange(len(x), device=x.device) + len(x) * mirrored
    return both.index_select(0, chosen).permute(0, 3, 1, 2)


def randaugment(x: Tensor, u: Tensor, magnitude: float = 5 / 30) -> Tensor:
    """Apply one operation, drawn for each image, at magnitude m = 5 of 30 (RandAugment n = 1, arXiv:1909.13719)."""
    kind = (u[:, 0] * len(OPERATIONS)).long()  # [b]
    sign = torch.where(u[:, 1] < 0.5, -1.0, 1.0)  # [b]
    out = x.clone(memory_format=torch.channels_last)
    for number, operation in enumerate(OPERATIONS):
        drawn = (kind == number).nonzero()[:, 0]
        if len(drawn):
            out[drawn] = operation(x[drawn], magnitude, sign[drawn])
    return out


AUGMENTATIONS = {
    "crop": Augmentation(2, crop),
    "flip": Augmentation(1, flip),
    "randaugment": Augmentation(2, randaugment),
}


def default_augment(shape: Sequence[int]) -> tuple[str, ...]:
    """Return the names that suit images [C, H, W]; grey ones may be digits or letters, which have no mirror image."""
    return ("crop",) if shape[0] == 1 else ("crop", "flip")

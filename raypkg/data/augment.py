"""Per-sample augmentation of whole batches: image tensors and a matrix of uniform numbers in, images out.

Nothing here draws: row i of ``u`` alone decides how sample i changes, so a worker that holds a slice of a batch changes
it as the whole batch would have been.

The 14 operations of RandAugment (arXiv:1909.13719) take uint8 images [b, C, H, W], a magnitude in [0, 1] and a sign ±1
per image [b]. Magnitude 1 is 30 in the paper: shear 0.3, translation 150/331 of the side, rotation 30°, enhancement
factors 1 ± 0.9, posterising to 4 bits, solarising everything.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

from raypkg.core.errors import UserError, described, unknown
from raypkg.core.registry import imported
from raypkg.core.seeds import seeded

SMOOTHING = [[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in grey
CROP = re.compile(r"crop:([1-9]\d?)(:reflect)?")  # a crop with its border in pixels

LOCK = Lock()  # of the global generator

Change = Callable[[Tensor, Tensor], Tensor]  # (uint8 [b, C, H, W], uniforms [b, draws]) → uint8 [b, C, H, W]
Number = Tensor | float


@dataclass(frozen=True)
class Augmentation:
    """A change of images, and the number of uniform numbers that it needs per image."""

    draws: int
    change: Change
    alternating: tuple[int, ...] = ()  # columns of uniforms that are 0 or 1 by turns of epochs, at first by a draw
    is_own: bool = False  # a user's function has a part: it draws from the global generator, so no thread may run it

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        """Change uint8 images [b, C, H, W] by uniforms [b, draws]."""
        return self.change(x, u)


def compose(names: Sequence[str]) -> Augmentation:
    """Return the named augmentations as one, in the given order; without names, the identity."""
    steps = []
    for name in names:
        if sized := CROP.fullmatch(name):
            steps.append(Augmentation(2, partial(crop, border=int(sized[1]), is_reflected=sized[2] is not None)))
        elif name in AUGMENTATIONS:
            steps.append(AUGMENTATIONS[name])
        elif ":" in name and not name.startswith("crop:"):
            steps.append(
                Augmentation(1, partial(own, name, imported("augmentation", name, AUGMENTATIONS)), is_own=True)
            )
        else:
            raise unknown("augmentation", name, [*AUGMENTATIONS, "crop:2", "crop:2:reflect"])
    draws = [step.draws for step in steps]
    alternating = [sum(draws[:i]) + column for i, step in enumerate(steps) for column in step.alternating]

    def change(x: Tensor, u: Tensor) -> Tensor:
        if steps and x.dim() != 4:
            options = f"{', '.join(names)} (dataset.augment, pretrain.randaugment)"
            raise UserError(f"samples of shape {list(x.shape[1:])} are no images: leave out {options}")
        # Each step takes the columns of u that follow those of the step before it.
        for step, uniforms in zip(steps, u.split(draws, dim=1), strict=True):
            x = step(x, uniforms)
        return x

    return Augmentation(sum(draws), change, tuple(alternating), any(step.is_own for step in steps))


def own(name: str, function: Callable[[Tensor], Tensor], x: Tensor, u: Tensor) -> Tensor:
    """Change each image, uint8 [C, H, W], by a user's function, such as a transform of torchvision.transforms.v2.

    PyTorch's global generator, seeded for the image while the function runs, gives its random numbers.
    """
    out = torch.empty_like(x)
    for i, draw in enumerate(u[:, 0].tolist()):
        with LOCK, seeded(int(draw * 2**24), "augment"):
            changed = function(x[i])
        if described(changed) != (needed := described(x[i])):
            raise UserError(f"augmentation {name!r} must return {needed}, not {described(changed)}")
        out[i] = changed
    return out


def crop(x: Tensor, u: Tensor, border: int = 0, is_reflected: bool = False) -> Tensor:
    """Shift each image within a border and cut its size out again, at an offset drawn for it.

    The border is black, of side // 8 pixels by default, or ``is_reflected``: mirrored at the outermost pixels.
    """
    b, c, height, width = x.shape
    border = border or max(1, width // 8)
    padded = x.permute(0, 2, 3, 1)  # [b, H, W, C], as they lie in memory
    if is_reflected:
        if border >= (side := min(height, width)):
            raise UserError(f"crop:{border}:reflect: images of {side} pixels reflect at most {side - 1}")
        for dim, last in ((1, height - 1), (2, width - 1)):
            place = torch.arange(-border, last + 1 + border, device=x.device)
            padded = padded.index_select(dim, last - (last - place.abs()).abs())
    else:
        padded = F.pad(padded, (0, 0, border, border, border, border)).contiguous()  # [b, H', W', C]
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
    sizes = kind.bincount(minlength=len(OPERATIONS)).tolist()  # the host waits once, not for each operation
    for drawn, operation in zip(kind.argsort(stable=True).split(sizes), OPERATIONS.values(), strict=True):
        if len(drawn):
            out[drawn] = operation(x[drawn], magnitude, sign[drawn])
    return out


def _autocontrast(x: Tensor, m: float, sign: Tensor) -> Tensor:
    low = x.amin((2, 3), keepdim=True).float()  # [b, C, 1, 1]
    high = x.amax((2, 3), keepdim=True).float()
    spread = (high - low).clamp_min(1)
    stretched = _to_uint8((x - low) * (255 / spread))
    # A channel of a single value has no range to stretch.
    return torch.where(high > low, stretched, x)


def _equalize(x: Tensor, m: float, sign: Tensor) -> Tensor:
    # Level each channel's histogram: v → ⌊(#{pixels < v} + s/2) / s⌋ with s = #{pixels < brightest} / 255.
    b, c = x.shape[:2]
    pixels = x.reshape(b, c, -1).long()  # [b, C, H·W]
    counts = torch.zeros(b, c, 256, dtype=torch.long, device=x.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))
    below = counts.cumsum(2) - counts  # [b, C, 256], pixels darker than each value
    brightest = pixels.amax(2, keepdim=True)
    step = below.gather(2, brightest) // 255  # [b, C, 1]
    levelled = (below + step // 2) // step.clamp_min(1)
    # Too few pixels below the brightest make a step of 0: the channel stays as it is.
    unchanged = torch.arange(256, device=x.device)
    table = torch.where(step > 0, levelled, unchanged).clamp_max(255)
    return table.gather(2, pixels).view(x.shape).to(torch.uint8)


def _sharpness(x: Tensor, m: float, sign: Tensor) -> Tensor:
    weights = torch.tensor(SMOOTHING, device=x.device)
    kernel = weights / weights.sum()
    smooth = x.float()  # the pixels of the border stay as they are
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(smooth, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])
    return _blend(x, smooth, m, sign)


def _rotate(x: Tensor, m: float, sign: Tensor) -> Tensor:
    angle = math.radians(30 * m) * sign
    return _warp(x, xx=angle.cos(), xy=-angle.sin(), yx=angle.sin(), yy=angle.cos())


def _blend(x: Tensor, other: Tensor | float, m: float, sign: Tensor) -> Tensor:
    """Return other + f·(x − other) with f = 1 ± 0.9·m."""
    factor = (1 + 0.9 * m * sign).view(-1, 1, 1, 1)  # [b, 1, 1, 1]
    return _to_uint8(other + factor * (x - other))


def _grey(x: Tensor) -> Tensor:
    """Return luma, rounded down as image libraries do, [b, 1, H, W]."""
    if x.shape[1] != 3:
        return x.float().mean(1, keepdim=True)
    weights = torch.tensor(LUMA, device=x.device).view(3, 1, 1)
    return (x * weights).sum(1, keepdim=True).floor()


def _to_uint8(x: Tensor) -> Tensor:
    return x.clamp(0, 255).to(torch.uint8)


def _shift(m: float, side: int) -> float:
    """Return a translation by whole pixels in units of half a side."""
    return int(150 / 331 * side * m) / side * 2


def _warp(
    x: Tensor, *, xx: Number = 1, xy: Number = 0, x1: Number = 0, yx: Number = 0, yy: Number = 1, y1: Number = 0
) -> Tensor:
    """Take the pixel at (x, y) from the pixel nearest to (xx·x + xy·y + x1, yx·x + yy·y + y1), black from outside.

    Coordinates are in units of half a side from the centre; a coefficient is one number, or one per image [b].
    """
    origin = torch.zeros(len(x), 6, device=x.device)
    for place, coefficient in enumerate((xx, xy, x1, yx, yy, y1)):
        origin[:, place] = coefficient
    grid = F.affine_grid(origin.view(-1, 2, 3), list(x.shape), align_corners=False)  # [b, H, W, 2]
    moved = F.grid_sample(x.float(), grid, mode="nearest", align_corners=False)
    return moved.to(torch.uint8)


OPERATIONS: dict[str, Callable[[Tensor, float, Tensor], Tensor]] = {  # images, magnitude m, signs → images
    "identity": lambda x, m, sign: x,
    "autocontrast": _autocontrast,  # stretches each channel to the whole range
    "equalize": _equalize,
    "rotate": _rotate,
    "solarize": lambda x, m, sign: torch.where(x >= 255 * (1 - m), 255 - x, x),  # inverts what is brighter
    "color": lambda x, m, sign: _blend(x, _grey(x), m, sign),
    "posterize": lambda x, m, sign: x >> round(4 * m) << round(4 * m),  # keeps the highest 8 … 4 bits
    "contrast": lambda x, m, sign: _blend(x, _grey(x).mean((1, 2, 3), keepdim=True), m, sign),
    "brightness": lambda x, m, sign: _blend(x, 0.0, m, sign),
    "sharpness": _sharpness,
    "shear_x": lambda x, m, sign: _warp(x, xy=0.3 * m * sign),
    "shear_y": lambda x, m, sign: _warp(x, yx=0.3 * m * sign),
    "translate_x": lambda x, m, sign: _warp(x, x1=-_shift(m, x.shape[3]) * sign),  # from the left to the right
    "translate_y": lambda x, m, sign: _warp(x, y1=-_shift(m, x.shape[2]) * sign),
}

AUGMENTATIONS = {
    "crop": Augmentation(2, crop),
    "flip": Augmentation(1, flip),
    "altflip": Augmentation(1, flip, alternating=(0,)),  # arXiv:2404.00498, Section 3.6
    "randaugment": Augmentation(2, randaugment),
}


def default_augment(shape: Sequence[int]) -> tuple[str, ...]:
    """Return the names that suit images [C, H, W]; grey ones may be digits or letters, which have no mirror image."""
    return ("crop",) if shape[0] == 1 else ("crop", "flip")

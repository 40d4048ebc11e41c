"""The 14 operations of RandAugment (arXiv:1909.13719), each on a batch of images at once.

An operation takes uint8 images [b, C, H, W], a magnitude in [0, 1] and a sign ±1 for each image [b], and returns
uint8 images. Full magnitude is what the paper calls 30: shear 0.3, translation 150/331 of the side, rotation 30°,
enhancement factors 1 ± 0.9, posterising to 4 bits, solarising everything.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Callable[[Tensor, float, Tensor], Tensor]

SMOOTHING = [[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in grey


def identity(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Change nothing."""
    return x


def autocontrast(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Stretch each channel to the whole range."""
    low = x.amin((2, 3), keepdim=True).float()  # [b, C, 1, 1]
    high = x.amax((2, 3), keepdim=True).float()
    spread = (high - low).clamp_min(1)
    stretched = _to_uint8((x - low) * (255 / spread))
    # A channel of a single value has no range to stretch.
    return torch.where(high > low, stretched, x)


def equalize(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Level each channel's histogram: v → ⌊(#{pixels < v} + s/2) / s⌋ with s = #{pixels < brightest} / 255."""
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


def solarize(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Invert what is brighter than a threshold."""
    threshold = 255 * (1 - magnitude)
    return torch.where(x >= threshold, 255 - x, x)


def posterize(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Keep the highest 8 … 4 bits."""
    dropped = round(4 * magnitude)
    return x >> dropped << dropped


def brightness(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Blend with black."""
    black = torch.zeros(1, device=x.device)
    return _blend(x, black, magnitude, sign)


def contrast(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Blend with the mean grey of the image."""
    mean = _grey(x).mean((1, 2, 3), keepdim=True)  # [b, 1, 1, 1]
    return _blend(x, mean, magnitude, sign)


def color(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Blend with the image in grey."""
    return _blend(x, _grey(x), magnitude, sign)


def sharpness(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Blend with the image smoothed by a 3×3 kernel; the pixels of the border stay as they are."""
    channels = x.shape[1]
    weights = torch.tensor(SMOOTHING, device=x.device)
    kernel = weights / weights.sum()
    smooth = x.float()
    inner = F.conv2d(smooth, kernel.expand(channels, 1, 3, 3), groups=channels)  # [b, C, H−2, W−2]
    smooth[:, :, 1:-1, 1:-1] = inner
    return _blend(x, smooth, magnitude, sign)


def rotate(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Turn about the centre."""
    angle = math.radians(30 * magnitude) * sign
    cos = angle.cos()
    sin = angle.sin()
    origin = _unmoved(sign)
    origin[:, 0, 0] = cos
    origin[:, 0, 1] = -sin
    origin[:, 1, 0] = sin
    origin[:, 1, 1] = cos
    return _warp(x, origin)


def shear_x(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Shift rows in proportion to their height."""
    slope = 0.3 * magnitude * sign
    origin = _unmoved(sign)
    origin[:, 0, 1] = slope
    return _warp(x, origin)


def shear_y(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Shift columns in proportion to their width."""
    slope = 0.3 * magnitude * sign
    origin = _unmoved(sign)
    origin[:, 1, 0] = slope
    return _warp(x, origin)


def translate_x(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Shift sideways."""
    width = x.shape[3]
    shift = _shift(magnitude, width) * sign
    origin = _unmoved(sign)
    origin[:, 0, 2] = -shift  # what moves to the right comes from the left
    return _warp(x, origin)


def translate_y(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Shift up or down."""
    height = x.shape[2]
    shift = _shift(magnitude, height) * sign
    origin = _unmoved(sign)
    origin[:, 1, 2] = -shift
    return _warp(x, origin)


OPERATIONS: tuple[Operation, ...] = (
    identity, autocontrast, equalize, rotate, solarize, color, posterize,
    contrast, brightness, sharpness, shear_x, shear_y, translate_x, translate_y,
)  # fmt: skip


def _blend(x: Tensor, other: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Return other + f·(x − other) with f = 1 ± 0.9·magnitude."""
    factor = 1 + 0.9 * magnitude * sign  # [b]
    factor = factor.view(-1, 1, 1, 1)
    return _to_uint8(other + factor * (x - other))


def _grey(x: Tensor) -> Tensor:
    """Return luma, rounded down as image libraries do, [b, 1, H, W]."""
    if x.shape[1] != 3:
        return x.float().mean(1, keepdim=True)
    weights = torch.tensor(LUMA, device=x.device).view(3, 1, 1)
    luma = (x * weights).sum(1, keepdim=True)
    return luma.floor()


def _to_uint8(x: Tensor) -> Tensor:
    return x.clamp(0, 255).to(torch.uint8)


def _unmoved(sign: Tensor) -> Tensor:
    """Return for each image the map that leaves every pixel where it is, [b, 2, 3].

    A map's two lines tell for a pixel at (x, y) which x and which y it came from, in units of half a side from the
    centre: three coefficients each, of x, of y and of 1.
    """
    same = torch.eye(2, 3, dtype=sign.dtype, device=sign.device)
    return same.repeat(len(sign), 1, 1)


def _shift(magnitude: float, side: int) -> float:
    """Return a translation by whole pixels in units of half a side."""
    pixels = int(150 / 331 * side * magnitude)
    return pixels / side * 2


def _warp(x: Tensor, origin: Tensor) -> Tensor:
    """Fetch each pixel from the pixel nearest to its origin; black comes in from outside."""
    grid = F.affine_grid(origin, list(x.shape), align_corners=False)  # [b, H, W, 2]
    moved = F.grid_sample(x.float(), grid, mode="nearest", align_corners=False)
    return moved.to(torch.uint8)

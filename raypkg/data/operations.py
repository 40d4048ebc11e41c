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


def identity(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Change nothing."""
    return x


def autocontrast(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Stretch each channel to the whole range."""
    low, high = x.amin((2, 3), keepdim=True).float(), x.amax((2, 3), keepdim=True).float()
    stretched = _bytes((x - low) * (255 / (high - low).clamp_min(1)))
    return torch.where(high > low, stretched, x)


def equalize(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Level each channel's histogram: v → ⌊(#{pixels < v} + s/2) / s⌋ with s = #{pixels < brightest} / 255."""
    flat = x.reshape(*x.shape[:2], -1).long()  # [b, C, H·W]
    counts = torch.zeros(*x.shape[:2], 256, dtype=torch.long, device=x.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    below = counts.cumsum(2) - counts  # [b, C, 256]
    step = below.gather(2, flat.amax(2, keepdim=True)) // 255
    table = torch.where(step > 0, (below + step // 2) // step.clamp_min(1), torch.arange(256, device=x.device))
    return table.clamp_max(255).gather(2, flat).view(x.shape).to(torch.uint8)


def solarize(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Invert what is brighter than a threshold."""
    return torch.where(x >= 255 * (1 - magnitude), 255 - x, x)


def posterize(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Keep the highest 8 … 4 bits."""
    dropped = round(4 * magnitude)
    return x >> dropped << dropped


def brightness(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Blend with black."""
    return _blend(x, torch.zeros(1, device=x.device), magnitude, sign)


def contrast(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Blend with the mean grey of the image."""
    return _blend(x, _grey(x).mean((1, 2, 3), keepdim=True), magnitude, sign)


def color(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Blend with the image in grey."""
    return _blend(x, _grey(x), magnitude, sign)


def sharpness(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Blend with the image smoothed by a 3×3 kernel, borders apart."""
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=x.device) / 13
    smooth = x.float()
    inner = F.conv2d(smooth, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])
    smooth[:, :, 1:-1, 1:-1] = inner
    return _blend(x, smooth, magnitude, sign)


def rotate(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Turn about the centre."""
    angle = math.radians(30 * magnitude) * sign
    return _warp(x, _matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos()))


def shear_x(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Shift rows in proportion to their height."""
    one, zero = torch.ones_like(sign), torch.zeros_like(sign)
    return _warp(x, _matrix(one, 0.3 * magnitude * sign, zero, one))


def shear_y(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Shift columns in proportion to their width."""
    one, zero = torch.ones_like(sign), torch.zeros_like(sign)
    return _warp(x, _matrix(one, zero, 0.3 * magnitude * sign, one))


def translate_x(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Shift sideways."""
    one, zero = torch.ones_like(sign), torch.zeros_like(sign)
    return _warp(x, _matrix(one, zero, zero, one, right=_pixels(magnitude, x.shape[3]) / x.shape[3] * 2 * sign))


def translate_y(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Shift up or down."""
    one, zero = torch.ones_like(sign), torch.zeros_like(sign)
    return _warp(x, _matrix(one, zero, zero, one, down=_pixels(magnitude, x.shape[2]) / x.shape[2] * 2 * sign))


OPERATIONS: tuple[Operation, ...] = (
    identity, autocontrast, equalize, rotate, solarize, color, posterize,
    contrast, brightness, sharpness, shear_x, shear_y, translate_x, translate_y,
)  # fmt: skip


def _blend(x: Tensor, other: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Return other + f·(x − other) with f = 1 ± 0.9·magnitude."""
    factor = (1 + 0.9 * magnitude * sign)[:, None, None, None]
    return _bytes(other + factor * (x - other))


def _grey(x: Tensor) -> Tensor:
    """Return luma, rounded down as image libraries do, [b, 1, H, W]."""
    if x.shape[1] != 3:
        return x.float().mean(1, keepdim=True)
    weights = torch.tensor([0.299, 0.587, 0.114], device=x.device)[:, None, None]
    return (x * weights).sum(1, keepdim=True).floor()


def _bytes(x: Tensor) -> Tensor:
    return x.clamp(0, 255).to(torch.uint8)


def _pixels(magnitude: float, side: int) -> int:
    return int(150 / 331 * side * magnitude)


def _matrix(
    xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor, right: Tensor | float = 0.0, down: Tensor | float = 0.0
) -> Tensor:
    """Return the maps from where a pixel is to where it came from, in units of half a side, [b, 2, 3]."""
    right, down = (torch.as_tensor(value, dtype=xx.dtype, device=xx.device).expand_as(xx) for value in (right, down))
    return torch.stack([torch.stack([xx, xy, -right], 1), torch.stack([yx, yy, -down], 1)], 1)


def _warp(x: Tensor, matrix: Tensor) -> Tensor:
    """Move pixels by affine maps, to the nearest pixel; black comes in from outside."""
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x.float(), grid, mode="nearest", align_corners=False).to(torch.uint8)

"""Parts of models of several families, and the shapes that they take."""

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from raypkg.core.errors import UserError
from raypkg.data.kinds import IMAGES, TEXTS, kind_of

INSTEAD = "for rows use 'mlp' or 'linear', for texts 'transformer' or transformers:NAME"
Shape = tuple[int, ...]  # of one sample, (C, H, W), (D,) or (L, V)
Width = Annotated[int, Field(ge=1, le=1 << 20)]  # of a layer; wider ones would overflow the sizes of tensors
Probability = Annotated[float, Field(ge=0, lt=1)]
Norm = Literal["batch", "group"]
GROUPS = 8  # of group norm, where the channels allow it


def image_shape(shape: Shape, least: int) -> tuple[int, int, int]:
    """Return (C, H, W), or refuse rows of a table and images with a side below ``least`` pixels."""
    if kind_of(shape) is not IMAGES:
        raise UserError(f"input shape {shape}: this model takes images (C, H, W); {INSTEAD}")
    channels, height, width = shape
    if min(height, width) < least:
        raise UserError(f"input shape {shape}: images for this model need at least {least} × {least} pixels")
    return channels, height, width


def flat_size(shape: Shape) -> int:
    """Return the number of values of a sample, or refuse texts."""
    if kind_of(shape) is TEXTS:
        raise UserError(f"input shape {shape}: this model takes images and rows; {INSTEAD}")
    return math.prod(shape)


def conv(channels: int, out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution that keeps the size at stride 1, and its batch norm, which has the bias."""
    convolution = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(out)]


def pooled(layers: list[nn.Module]) -> nn.Sequential:
    """Return layers on images followed by the mean of each channel of the last one: [b, C, H, W] → [b, D]."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def kaiming(module: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 2 / fan_out) (He et al., arXiv:1502.01852, equation 14).

    Weights on the meta device, as while a model's size is checked, are skipped: PyTorch would import its compiler.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and not layer.weight.is_meta:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

"""What models of several families are built of."""

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
    """Return (C, H, W), or refuse rows of a table and images with a side below ``least`` pixels.

    >>> image_shape((3, 32, 32), least=4)
    (3, 32, 32)
    """
    if kind_of(shape) is not IMAGES:
        raise UserError(f"input shape {shape}: this model takes images (C, H, W); {INSTEAD}")
    channels, height, width = shape
    if min(height, width) < least:
        raise UserError(f"input shape {shape}: images for this model need at least {least} × {least} pixels")
    return channels, height, width


def text_shape(shape: Shape) -> tuple[int, int]:
    """Return (L, V), or refuse images and rows.

    >>> text_shape((64, 8192))
    (64, 8192)
    """
    if kind_of(shape) is not TEXTS:
        raise UserError(f"input shape {shape}: this model takes texts (L, V); for images or rows use 'mlp'")
    length, vocabulary = shape
    return length, vocabulary


def flat_size(shape: Shape) -> int:
    """Return how many numbers a sample is, or refuse texts, which are none.

    >>> flat_size((3, 32, 32))
    3072
    """
    if kind_of(shape) is TEXTS:
        raise UserError(f"input shape {shape}: this model takes images and rows; {INSTEAD}")
    return math.prod(shape)


def conv(channels: int, out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution that keeps the size at stride 1, and its batch norm, which has the bias."""
    convolution = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(out)]


def hidden_layer(units: int, out: int, dropout: float) -> list[nn.Module]:
    """Return a fully connected layer: its norm takes the place of the bias and, by default, of dropout."""
    return [
        nn.Linear(units, out, bias=False),
        nn.BatchNorm1d(out),
        nn.ReLU(),
        nn.Dropout(dropout),
    ]


def fitting(side: int, strides: list[int]) -> list[int]:
    """Return the strides, 1 for each that would leave a single pixel before the last one does.

    >>> fitting(32, [2, 2, 2, 2, 2]), fitting(8, [2, 2, 2, 2, 2])
    ([2, 2, 2, 2, 2], [2, 2, 1, 1, 2])
    """
    *early, last = strides
    fit = []
    for stride in early:
        fits = stride if side > stride else 1
        side = -(-side // fits)  # ⌈side / stride⌉
        fit.append(fits)
    return [*fit, last]


def pooled(layers: list[nn.Module]) -> nn.Sequential:
    """Return layers on images, and the mean of what each channel of the last one gives.

    Maps [b, C, H, W] to [b, D] for D channels of the last layer.
    """
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def kaiming(module: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 2 / fan_out) (He et al., arXiv:1502.01852, equation 14).

    Weights on the meta device, which a model has while its size is checked, stay as they are: they hold no numbers,
    and PyTorch would import its compiler to draw them.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and not layer.weight.is_meta:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

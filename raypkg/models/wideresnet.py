"""Wide residual networks (Zagoruyko & Komodakis 2016): few layers, k times the channels, batch norm first."""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from . import model
from .classifier import Classifier, image_shape, kaiming

WRN = "arXiv:1605.07146"
Shape = tuple[int, ...]
Probability = Annotated[float, Field(ge=0, lt=1)]


class WideBlock(nn.Module):
    """x + branch(relu(bn(x))); where the shape changes, the shortcut is a 1 × 1 convolution of relu(bn(x)) as well."""

    def __init__(self, channels: int, out: int, stride: int, dropout: float):
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        first = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.branch = nn.Sequential(first, nn.BatchNorm2d(out), nn.ReLU(), nn.Dropout(dropout), second)
        same = (channels, stride) == (out, 1)
        self.projection = None if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, C_in, H, W] to [b, C_out, ⌈H / stride⌉, ⌈W / stride⌉]."""
        active = self.activation(x)
        return self.branch(active) + (x if self.projection is None else self.projection(active))


def wide(shape: Shape, num_classes: int, depth: int, k: int, dropout: float) -> Classifier:
    """Table 1: 6n + 4 layers in three stages of n blocks with 16k, 32k, 64k channels."""
    channels, _, _ = image_shape(shape, least=4)
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)]
    before = 16
    for stage, out in enumerate([16 * k, 32 * k, 64 * k]):
        for block in range((depth - 4) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(WideBlock(before, out, stride, dropout))
            before = out
    norm = [nn.BatchNorm2d(before), nn.ReLU()]
    features = nn.Sequential(*layers, *norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())  # [b, C, H, W] → [b, 64k]
    kaiming(features)
    return Classifier(features, nn.Linear(before, num_classes))


@model("wrn-16-8", source=WRN)
def wrn_16_8(shape: Shape, num_classes: int, *, dropout: Probability = 0.0) -> Classifier:
    """Wide ResNet with 16 layers of 8 times the channels, 11.0 M parameters."""
    return wide(shape, num_classes, 16, 8, dropout)


@model("wrn-16-10", source=WRN)
def wrn_16_10(shape: Shape, num_classes: int, *, dropout: Probability = 0.0) -> Classifier:
    """Wide ResNet with 16 layers of 10 times the channels, 17.1 M parameters."""
    return wide(shape, num_classes, 16, 10, dropout)


@model("wrn-22-8", source=WRN)
def wrn_22_8(shape: Shape, num_classes: int, *, dropout: Probability = 0.0) -> Classifier:
    """Wide ResNet with 22 layers of 8 times the channels, 17.2 M parameters."""
    return wide(shape, num_classes, 22, 8, dropout)


@model("wrn-28-2", source=WRN)
def wrn_28_2(shape: Shape, num_classes: int, *, dropout: Probability = 0.0) -> Classifier:
    """Wide ResNet with 28 layers of twice the channels, 1.5 M parameters."""
    return wide(shape, num_classes, 28, 2, dropout)


@model("wrn-28-10", source=WRN)
def wrn_28_10(shape: Shape, num_classes: int, *, dropout: Probability = 0.0) -> Classifier:
    """Wide ResNet with 28 layers of 10 times the channels, 36.5 M parameters."""
    return wide(shape, num_classes, 28, 10, dropout)
